"""The weights of a trainer's model by their checkpoint names; knows PEFT's adapters, imports nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def named_weights(model: Any) -> Iterator[Iterator[tuple[str, Any]]]:
    """The weights of a model by their checkpoint names; adapters of PEFT are merged while they are read."""
    if not hasattr(model, "merge_adapter"):
        yield ((name, weight.data) for name, weight in model.named_parameters())
        return

    model.merge_adapter()
    try:
        yield _merged_weights(model)
    finally:
        model.unmerge_adapter()


def _merged_weights(model: Any) -> Iterator[tuple[str, Any]]:
    for name, weight in model.named_parameters():
        if model.prefix in name or "original_module" in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        yield name.replace("modules_to_save.default.", ""), weight.data

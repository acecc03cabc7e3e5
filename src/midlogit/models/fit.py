"""Whether the files of a checkpoint hold what its configuration asks for: every tensor, in its shape.

Knows headers and architectures, and trusts no loader's report; reads weights only where two are to be equal.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from midlogit.errors import ModelUnavailable
from midlogit.models.checkpoint import Checkpoint
from midlogit.models.files import open_config
from midlogit.models.weights import Stored, architecture, stored_tensors, weights_folder

FLOATING = ("F64", "F32", "F16", "BF16")
NEVER_STORED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")  # buffers of older checkpoints
SHOWN = 3


def require_fit(checkpoint: Checkpoint) -> None:
    """Checks that files and configuration fit, so that no weight is left at a random value.

    Files in another arrangement than the architecture's are only counted: loaders know their names. Quantised ones
    must hold something of each layer; the rest is left to the loader.

    Raises:
        ModelUnavailable: says which tensor of which file, or which field, does not fit.
    """
    folder = weights_folder(checkpoint)
    stored = stored_tensors(folder)
    if not stored:
        raise ModelUnavailable(
            f"The weights of {checkpoint.name} cannot be loaded: {_other(folder)}"
        )
    layers = int(checkpoint.config.num_hidden_layers)
    if not 0 < layers <= len(stored):
        raise ModelUnavailable(
            f"The config.json of {checkpoint.name} has {layers} layers, its files {len(stored)} tensors."
        )

    # The checkpoint knows the configuration of its text model alone; files hold the other parts, too.
    whole = open_config(checkpoint.name, trust_remote_code=checkpoint.trust_remote_code)
    model = architecture(replace(checkpoint, config=whole))
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        _require_layers(model, stored, folder)
    else:
        _compare(model, stored, folder)


def _require_layers(model: Any, stored: dict[str, Stored], folder: Path) -> None:
    """Checks that files hold a tensor of each layer, whatever it is called there.

    Raises:
        ModelUnavailable: as `require_fit`.
    """
    layers = {name.rpartition(".")[0] for name in stored}
    missing = [
        name
        for name, _ in model.named_parameters()
        if not any(known.rpartition(".")[0] in layers for known in _names_of(model, name))
    ]
    if missing and not _is_rearranged(model):
        raise ModelUnavailable(f"The weights in {folder} lack {_list(missing)}.")


def _compare(model: Any, stored: dict[str, Stored], folder: Path) -> None:
    """Compares the parameters of an architecture with stored tensors.

    Raises:
        ModelUnavailable: as `require_fit`.
    """
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    names = {name: [n for n in _names_of(model, name) if n in stored] for name in wanted}
    missing = [name for name, found in names.items() if not found]
    if missing:
        is_short = sum(t.size for t in stored.values()) < sum(map(math.prod, wanted.values()))
        if is_short or not _is_rearranged(model):
            raise ModelUnavailable(f"The weights in {folder} lack {_list(missing)}.")
        return

    for name, found in names.items():
        for tensor in (stored[n] for n in found):
            if tensor.shape != wanted[name] and not _is_rearranged(model):
                raise ModelUnavailable(
                    f"{tensor.file} holds {name} in the shape {list(tensor.shape)},"
                    f" config.json asks for {list(wanted[name])}."
                )
            if tensor.dtype not in FLOATING:
                raise ModelUnavailable(f"{tensor.file} holds {name} as {tensor.dtype}.")
        if len(found) > 1:
            _require_equal(stored, *found[:2])

    known = {n for name in model.state_dict() for n in _names_of(model, name)}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *NEVER_STORED]
    further = [
        name
        for name in sorted(stored.keys() - known)
        if not any(re.search(pattern, name) for pattern in ignored)
    ]
    if further and not _is_rearranged(model):
        raise ModelUnavailable(
            f"{stored[further[0]].file} holds {_list(further)}, for which config.json has no place."
        )


def _names_of(model: Any, name: str) -> list[str]:
    """The names that a tensor of the model may be stored by: its own, and those of weights that are tied to it."""
    state = model.state_dict(keep_vars=True)
    tied = [other for other in state if other != name and state[other] is state[name]]
    prefix = f"{model.base_model_prefix}."
    return [n for own in (name, *tied) for n in (own, own.removeprefix(prefix))]


def _is_rearranged(model: Any) -> bool:
    """Whether transformers takes the tensors of files apart or renames them for this architecture."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def _require_equal(stored: dict[str, Stored], one: str, other: str) -> None:
    """Checks that two stored tensors that are tied are one.

    Raises:
        ModelUnavailable: they differ.
    """
    from safetensors import safe_open

    values = []
    for name in (one, other):
        with safe_open(stored[name].file, framework="pt") as opened:
            values.append(opened.get_tensor(name))
    if not values[0].equal(values[1]):
        raise ModelUnavailable(
            f"{stored[one].file} holds {one} and another {other}, and config.json ties them.",
            "Set tie_word_embeddings to false.",
        )


def _other(folder: Path) -> str:
    """What a folder holds in place of safetensors files."""
    others = [
        file.name
        for pattern in ("*.bin", "*.gguf", "*.safetensors")
        for file in folder.glob(pattern)
    ]
    if not others:
        return "there is no model.safetensors."
    return f"there is no model.safetensors, and {min(others)} is not read. Save them with save_pretrained."


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

"""From two models to an engine in this process; knows the order of the checks, imports torch after them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midlogit.engines.draft_length import DraftLength, SpeculationOption
from midlogit.errors import InvalidRequest
from midlogit.extras import require
from midlogit.kinds import require_count
from midlogit.models.checkpoint import Checkpoint, TemplateNames, names_of_sides, open_checkpoints
from midlogit.models.fit import require_fit
from midlogit.models.mixing import Mixing
from midlogit.models.modules import checkpoint_of

if TYPE_CHECKING:
    from torch.nn import Module

    from midlogit.engines.local.engine import LocalEngine


def open_pair(
    base: str | Path | Module | None,
    teacher: str | Path | Module | None,
    *,
    base_tokenizer: Any,
    teacher_tokenizer: Any,
    device: str | tuple[str, str],
    dtype: str,
    max_num_seqs: int,
    speculation: SpeculationOption,
    chat_template: TemplateNames,
    trust_remote_code: bool,
) -> tuple[Mixing, LocalEngine]:
    """See `Pair.local`."""
    require_count(max_num_seqs=max_num_seqs)
    draft_length = DraftLength(speculation)
    modules = _module(base), _module(teacher)
    checkpoints = _open_checkpoints(
        (base, teacher),
        (base_tokenizer, teacher_tokenizer),
        chat_template,
        trust_remote_code=trust_remote_code,
    )
    require("torch", "local")
    for checkpoint, module in zip(checkpoints, modules, strict=True):
        if module is None:
            require_fit(checkpoint)
    mixing = Mixing(*checkpoints)
    mixing.require_mixable()

    import torch

    from midlogit.engines.local.engine import LocalEngine

    # What is made in the caller's inference mode could not be written to in the engine's thread.
    with torch.inference_mode(False):
        engine = LocalEngine(
            *checkpoints,
            modules=modules,
            vocabulary=mixing.alignment.size,
            devices=device if isinstance(device, tuple) else (device, device),
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            draft_length=draft_length,
        )
    engine.start()
    return mixing, engine


def _module(side: str | Path | Module | None) -> Module | None:
    """The side, where it is a module."""
    return None if side is None or isinstance(side, str | Path) else side


def _open_checkpoints(
    sides: Sequence[Any],
    tokenizers: Sequence[Any],
    chat_template: TemplateNames,
    *,
    trust_remote_code: bool,
) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoints of two folders or modules.

    Raises:
        InvalidRequest: only one side is given, or a tokenizer for a folder, which has its own.
    """
    for side, tokenizer in zip(("base", "teacher"), tokenizers, strict=True):
        if tokenizer is not None and _module(sides[side == "teacher"]) is None:
            raise InvalidRequest(
                f"{side}_tokenizer is given, but the {side} is no module.",
                "Leave it out: a folder holds its tokenizer.",
            )
    if None in sides or all(_module(side) is None for side in sides):
        return open_checkpoints(
            sides[0], sides[1], chat_template, trust_remote_code=trust_remote_code
        )

    base, teacher = (
        Checkpoint.open(side, name, trust_remote_code=trust_remote_code)
        if _module(side) is None
        else checkpoint_of(side, tokenizer, name)
        for side, tokenizer, name in zip(
            sides, tokenizers, names_of_sides(chat_template), strict=True
        )
    )
    return base, teacher

"""From two model folders to an engine in this process; knows the order of the checks, imports torch after them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from midlogit.engines.draft_length import DraftLength, SpeculationOption
from midlogit.errors import InvalidRequest
from midlogit.extras import require
from midlogit.models.checkpoint import TemplateNames, open_checkpoints
from midlogit.models.mixing import Mixing

if TYPE_CHECKING:
    from midlogit.engines.local.engine import LocalEngine


def open_pair(
    base: str | Path | None,
    teacher: str | Path | None,
    *,
    device: str | tuple[str, str],
    dtype: str,
    max_num_seqs: int,
    speculation: SpeculationOption,
    chat_template: TemplateNames,
) -> tuple[Mixing, LocalEngine]:
    """See `Pair.local`."""
    if max_num_seqs < 1:
        raise InvalidRequest(f"max_num_seqs is {max_num_seqs}.", "It must be at least 1.")
    draft_length = DraftLength(speculation)
    checkpoints = open_checkpoints(base, teacher, chat_template)
    mixing = Mixing(*checkpoints)
    mixing.require_mixable()

    require("torch", "local")
    from midlogit.engines.local.engine import LocalEngine

    engine = LocalEngine(
        *checkpoints,
        vocabulary=mixing.alignment.size,
        devices=device if isinstance(device, tuple) else (device, device),
        dtype=dtype,
        max_num_seqs=max_num_seqs,
        draft_length=draft_length,
    )
    engine.start()
    return mixing, engine

"""From two model folders to a vLLM engine in this process; knows the order of the checks, imports torch after them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midlogit.engines.draft_length import DraftLength, SpeculationOption, require_speculation
from midlogit.errors import InvalidRequest
from midlogit.extras import require
from midlogit.models.checkpoint import TemplateNames, open_checkpoints
from midlogit.models.mixing import Mixing

if TYPE_CHECKING:
    from midlogit.engines.vllm.engine import VllmEngine


def open_pair(
    base: str | Path | None,
    teacher: str | Path | None,
    *,
    dtype: str,
    gpu_memory_utilization: float,
    kv_cache_memory_bytes: tuple[int, int] | None,
    max_num_seqs: int,
    max_model_len: int | None,
    speculation: SpeculationOption,
    chat_template: TemplateNames,
    options: Mapping[str, Any],
) -> tuple[Mixing, VllmEngine]:
    """See `Pair.vllm`."""
    if max_num_seqs < 1:
        raise InvalidRequest(f"max_num_seqs is {max_num_seqs}.", "It must be at least 1.")
    if not 0 < gpu_memory_utilization <= 1:
        raise InvalidRequest(
            f"gpu_memory_utilization is {gpu_memory_utilization}.", "It is a share of the device, in (0, 1]."
        )
    require_speculation(speculation)

    checkpoints = open_checkpoints(base, teacher, chat_template)
    for side, checkpoint in zip(("base", "teacher"), checkpoints, strict=True):
        if max_model_len is not None and not 1 <= max_model_len <= checkpoint.max_context:
            raise InvalidRequest(
                f"max_model_len is {max_model_len}.",
                f"The {side} {checkpoint.name} takes 1 to {checkpoint.max_context} tokens.",
            )
    limited = (
        replace(checkpoints[0], max_context=max_model_len or checkpoints[0].max_context),
        replace(checkpoints[1], max_context=max_model_len or checkpoints[1].max_context),
    )
    mixing = Mixing(*limited)
    mixing.require_mixable()

    require("torch", "local")
    from midlogit.engines.vllm.engine import DRAFTS, VllmEngine

    engine = VllmEngine(
        *limited,
        vocabulary=mixing.alignment.size,
        dtype=dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        draft_length=DraftLength(speculation, DRAFTS, reuses_bonus_row=True),
        options=options,
    )
    engine.start()
    return mixing, engine

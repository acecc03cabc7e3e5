"""Splits the memory of one device between two engines; knows sizes of models, runs nothing.

vLLM's own profiling measures one engine per process, so both caches are given as numbers (docs/vllm.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from midlogit.engines.draft_length import MAX_DRAFTS
from midlogit.engines.vllm.guesses import MAX_BATCH
from midlogit.errors import DoesNotFit
from midlogit.models.checkpoint import Checkpoint
from midlogit.models.weights import key_value_heads, kv_values_per_token, weight_bytes

GIB = 2**30
FORWARD_TOKENS = 16384  # most tokens of one forward pass, by vLLM's default on large cards
SCORED_TOKENS = (
    16384  # given tokens of texts whose hidden states are kept, unless one text alone has more
)
SCORED_ROWS = 256  # given tokens whose logits there are at a time
GRAPHS_BYTES = GIB  # CUDA graphs and workspaces of one engine, generously
CPU_CACHE_GIB = 1.0  # both caches on a CPU, unless VLLM_CPU_KVCACHE_SPACE says otherwise
SHORTEST_CONTEXT = 2048  # tokens that a cache must hold when no context is asked for
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that one engine needs, in bytes.

    Attributes:
        weights: of the model.
        forward: activations of the largest forward pass, logits, hidden states of given texts, CUDA graphs.
        token: of the KV cache for one token.
    """

    name: str
    weights: int
    forward: int
    token: int

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        max_num_seqs: int,
        drafts: int,
        cache_dtype: str = "auto",
        adapter_weights: int = 0,
        ranks: int = 1,
    ) -> Need:
        """Estimates it from the checkpoint's configuration; quantised weights count by their files.

        Args:
            drafts: the largest number of drafts per step.
            cache_dtype: of the KV cache, as vLLM names it; formats of less than 8 bits count as 8.
            adapter_weights: numbers of its adapter.
            ranks: that share the model; each holds whole heads of attention, and the logits of all ids.
        """
        config, width = checkpoint.config, dtype.itemsize
        share = max(1 / ranks, 1 / key_value_heads(checkpoint))
        inner = int(getattr(config, "intermediate_size", 4 * config.hidden_size))
        hidden = int(config.hidden_size) * width
        activations = FORWARD_TOKENS * (2 * inner // ranks * width + 4 * hidden)
        read = (1 + drafts) * max_num_seqs
        if drafts:
            read = max(read, (1 + MAX_DRAFTS) * min(max_num_seqs, MAX_BATCH))  # with guesses
        rows = 2 * max_num_seqs + read + SCORED_ROWS
        # Of several texts there is a second copy when they are decided.
        states = max(2 * SCORED_TOKENS, checkpoint.max_context) * hidden
        return cls(
            checkpoint.name,
            weight_bytes(checkpoint, width) // ranks + adapter_weights * width,
            activations + states + rows * checkpoint.logit_size * 4 + GRAPHS_BYTES,
            round(kv_values_per_token(checkpoint) * share) * _cache_width(cache_dtype, dtype),
        )

    def describe(self) -> str:
        return f"{self.name} needs {(self.weights + self.forward) / GIB:.1f} GiB without its cache"


@dataclass(frozen=True, slots=True)
class Split:
    """Bytes of KV cache for each engine, and the share of the device that it may take in all."""

    base_cache: int
    teacher_cache: int
    base_share: float
    teacher_share: float


def device_memory() -> tuple[int, int]:
    """Free and total bytes of this rank's GPU; zeros on a CPU."""
    return torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)


def split_device(
    base: Checkpoint,
    teacher: Checkpoint,
    *,
    dtype: str,
    utilization: float,
    given: tuple[int, int] | None,
    max_num_seqs: int,
    max_model_len: int | None,
    drafts: int,
    devices: Sequence[tuple[int, int]],
    cache_dtypes: tuple[str, str] = ("auto", "auto"),
    adapter_weights: tuple[int, int] = (0, 0),
) -> Split:
    """Splits the device of each rank between two models, all alike.

    Args:
        dtype: as vLLM names it.
        utilization: share of the device for both together.
        given: sizes of the caches (base, teacher); None splits what is left.
        max_num_seqs: most sequences that run at once.
        max_model_len: most tokens of a sequence, None for the models' own limit.
        drafts: the largest number of drafts per step.
        cache_dtypes: of the KV caches of (base, teacher), as vLLM names them.
        adapter_weights: numbers of the adapters of (base, teacher).
        devices: free and total bytes of each rank's.

    Raises:
        DoesNotFit: the two models and their caches are larger than the device.
    """
    needs = [
        Need.of(
            checkpoint,
            _dtype_of(checkpoint, dtype),
            max_num_seqs,
            drafts,
            cache_dtypes[side],
            adapter_weights[side],
            len(devices),
        )
        for side, checkpoint in enumerate((base, teacher))
    ]
    base_need, teacher_need = needs
    if not torch.cuda.is_available():
        return split_cpu(base_need, teacher_need, given)

    free, total = map(min, zip(*devices, strict=True))
    context = max_model_len or min(base.max_context, teacher.max_context, SHORTEST_CONTEXT)
    return split(
        base_need,
        teacher_need,
        utilization=utilization,
        context=context,
        total=total,
        free=free,
        given=given,
    )


def split(
    base: Need,
    teacher: Need,
    *,
    utilization: float,
    context: int,
    total: int,
    free: int,
    given: tuple[int, int] | None,
) -> Split:
    """Splits a device so that both caches hold the same number of tokens.

    Args:
        utilization: share of the device for both together.
        context: tokens that each cache must hold at least.
        total, free: bytes of the device.
        given: sizes of the caches (base, teacher); None chooses them.

    Raises:
        DoesNotFit: the two do not fit; the error says how much each needs and what is free.
    """
    fixed = base.weights + base.forward + teacher.weights + teacher.forward
    budget = min(int(utilization * total), free)
    remaining = budget - fixed
    base_cache, teacher_cache = given or _equal_tokens(base, teacher, remaining)

    if (
        base_cache + teacher_cache > remaining
        or base_cache < context * base.token
        or teacher_cache < context * teacher.token
    ):
        least = context * (base.token + teacher.token)
        raise DoesNotFit(
            f"The two models do not fit: {base.describe()}, {teacher.describe()}, and caches for {context} tokens take"
            f" {least / GIB:.1f} GiB; {budget / GIB:.1f} GiB may be used ({free / GIB:.1f} GiB of {total / GIB:.1f} are"
            f" free, gpu_memory_utilization {utilization}).",
            "Raise gpu_memory_utilization, lower max_model_len or max_num_seqs, or take smaller models.",
        )
    return Split(
        base_cache,
        teacher_cache,
        (base.weights + base.forward + base_cache) / total,
        (teacher.weights + teacher.forward + teacher_cache) / total,
    )


def split_cpu(base: Need, teacher: Need, given: tuple[int, int] | None) -> Split:
    """Splits the cache space of a CPU, where weights and activations are ordinary memory."""
    both = int(float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)) * GIB)
    base_cache, teacher_cache = given or _equal_tokens(base, teacher, both)
    return Split(base_cache, teacher_cache, 0.4, 0.4)


def _equal_tokens(base: Need, teacher: Need, size: int) -> tuple[int, int]:
    """Divides bytes so that both caches hold the same number of tokens."""
    both = base.token + teacher.token
    return size * base.token // both, size * teacher.token // both


def _cache_width(cache_dtype: str, dtype: torch.dtype) -> int:
    """Bytes of one number in the KV cache."""
    if cache_dtype == "auto":
        return dtype.itemsize
    return DTYPES[cache_dtype].itemsize if cache_dtype in DTYPES else 1


def _dtype_of(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    own = getattr(checkpoint.config, "dtype", None)
    return DTYPES.get(dtype, own if isinstance(own, torch.dtype) else torch.bfloat16)

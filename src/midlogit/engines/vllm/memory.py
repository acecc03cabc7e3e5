"""How the memory of one device is split between two engines; knows sizes of models, runs nothing.

vLLM's own profiling measures one engine a process, so both caches are given as numbers (docs/vllm.md).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from midlogit.errors import DoesNotFit
from midlogit.models.checkpoint import Checkpoint

GIB = 2**30
FORWARD_TOKENS = 16384  # most tokens that vLLM's default batches into one forward on large cards
GRAPHS_BYTES = GIB  # CUDA graphs and workspaces of one engine, with room
CPU_CACHE_GIB = 1.0  # of both caches together on the CPU, unless VLLM_CPU_KVCACHE_SPACE says otherwise


@dataclass(frozen=True, slots=True)
class Need:
    """What one engine takes of the device, in bytes.

    Attributes:
        weights: of the model. forward: activations of the largest forward, logits, CUDA graphs.
        token: of the KV cache for one token.
    """

    name: str
    weights: int
    forward: int
    token: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype, max_num_seqs: int, drafts: int) -> Need:
        """By the checkpoint's configuration; quantised weights count by their files.

        Args:
            drafts: the most that a step has.
        """
        config, width = checkpoint.config, dtype.itemsize
        inner = int(getattr(config, "intermediate_size", 4 * config.hidden_size))
        activations = FORWARD_TOKENS * (2 * inner + 4 * int(config.hidden_size)) * width
        logits = (3 + drafts) * max_num_seqs * checkpoint.logit_size * 4
        return cls(
            checkpoint.name,
            checkpoint.weight_bytes(width),
            activations + logits + GRAPHS_BYTES,
            checkpoint.kv_values_per_token * width,
        )

    def describe(self) -> str:
        return f"{self.name} needs {(self.weights + self.forward) / GIB:.1f} GiB without its cache"


@dataclass(frozen=True, slots=True)
class Split:
    """What each engine gets: bytes of KV cache, and the share of the device that it may take in all."""

    base_cache: int
    teacher_cache: int
    base_share: float
    teacher_share: float


def split(
    base: Need, teacher: Need, *, utilization: float, context: int, total: int, free: int, given: tuple[int, int] | None
) -> Split:
    """Splits a device so that both caches hold the same number of tokens.

    Args:
        utilization: the share of the device for both together. context: tokens that each cache must hold at least.
        total, free: bytes of the device. given: sizes of the caches (base, teacher), to be taken as they are.

    Raises:
        DoesNotFit: the two do not fit; says how much each needs and what is free.
    """
    fixed = base.weights + base.forward + teacher.weights + teacher.forward
    budget = min(int(utilization * total), free)
    room = budget - fixed
    base_cache, teacher_cache = given or (
        room * base.token // (base.token + teacher.token),
        room * teacher.token // (base.token + teacher.token),
    )
    if (
        base_cache + teacher_cache > room
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
    """The same on the CPU, where weights and activations are ordinary memory and only the caches are sized."""
    both = int(float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)) * GIB)
    base_cache, teacher_cache = given or (
        both * base.token // (base.token + teacher.token),
        both * teacher.token // (base.token + teacher.token),
    )
    return Split(base_cache, teacher_cache, 0.4, 0.4)

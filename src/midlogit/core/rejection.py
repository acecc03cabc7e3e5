"""Rejection sampling of drafts: which are accepted, and what replaces the others; knows probabilities, no models.

docs/speculation.md section 1. Leviathan et al. 2023 and Chen et al. 2023 give the rule for a target that is one model;
it holds for any target that the two rows determine.
"""

from __future__ import annotations

from collections.abc import Sequence

from midlogit.core.arrays import Array, array_namespace, row_sum


def accepted(target_N: Array, draft_N: Array, uniform_N: Array) -> Array:
    """Whether each draft d is accepted: with probability min(1, r(d)/D(d)), never where D(d) is 0.

    Args:
        target_N, draft_N: r(d) and D(d), the probabilities of the draft under the target and under the distribution
            that it was drawn from.
        uniform_N: uniforms in [0, 1).
    """
    return (draft_N > 0) & (uniform_N * draft_N < target_N)


def residual(target_NV: Array, draft_NV: Array) -> Array:
    """(r − D)₊, the masses to replace rejected drafts from; r itself where rounding leaves nothing of it."""
    xp = array_namespace(target_NV)
    rest_NV = xp.maximum(target_NV - draft_NV, xp.zeros_like(target_NV))
    return xp.where((row_sum(xp, rest_NV) > 0)[:, None], rest_NV, target_NV)


def num_accepted(drafted: Sequence[int], sampled: Sequence[int | None]) -> int:
    """The number of accepted drafts of one sequence: those sampled, up to the first that was not.

    Args:
        drafted: drafted token ids.
        sampled: the tokens of the same positions, of fewer or more of them; None where none could be sampled.
    """
    count = 0
    for draft, token_id in zip(drafted, sampled, strict=False):
        if draft != token_id:
            break
        count += 1
    return count

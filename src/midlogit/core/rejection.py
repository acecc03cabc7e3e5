"""Whether a drafted token stands under the target, and what is drawn where it does not; knows two rows of masses.

docs/speculation.md section 1. Leviathan et al. 2023 and Chen et al. 2023 give the rule for a target that is one model;
it holds for any target that the two rows determine.
"""

from __future__ import annotations

from collections.abc import Sequence

from midlogit.core.arrays import Array, array_namespace, row_sum


def accepted(target_N: Array, draft_N: Array, uniform_N: Array) -> Array:
    """Whether each drafted token stands: with probability min(1, r(d)/D(d)); never where D has no mass at all.

    Args:
        target_N, draft_N: r(d) and D(d), the probabilities of the drafted token under the target and under the
            distribution that it was drafted from.
        uniform_N: uniforms in [0, 1).
    """
    return (draft_N > 0) & (uniform_N * draft_N < target_N)


def residual(target_NV: Array, draft_NV: Array) -> Array:
    """(r − D)₊, the masses that a rejected draft is replaced from; r itself where rounding leaves nothing of it."""
    xp = array_namespace(target_NV)
    rest_NV = xp.maximum(target_NV - draft_NV, xp.zeros_like(target_NV))
    return xp.where((row_sum(xp, rest_NV) > 0)[:, None], rest_NV, target_NV)


def num_accepted(drafted: Sequence[int], sampled: Sequence[int]) -> int:
    """Counts the drafts of one sequence that were sampled, up to the first that was not.

    Args:
        drafted: drafted token ids. sampled: what was sampled in their places, perhaps of fewer or more positions.
    """
    pairs = zip(drafted, sampled, strict=False)
    return next((n for n, (draft, token) in enumerate(pairs) if draft != token), min(len(drafted), len(sampled)))

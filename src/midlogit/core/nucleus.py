"""The teacher's nucleus: the smallest set of its most likely outcomes that reaches a mass; knows one model's rows.

docs/theory.md (15). Found without sorting the vocabulary: the number of candidates grows until they hold the set.
"""

from __future__ import annotations

from typing import NamedTuple

from midlogit.core.arrays import (
    Array,
    array_namespace,
    descending_order,
    device,
    float64,
    last_index,
    log_sum_exp,
    running_sum,
    take_columns,
    top_k_unordered,
)

FIRST_CANDIDATES = 128


class Nucleus(NamedTuple):
    """The support S of each row, K the largest |S| of the batch.

    Attributes:
        columns_NK: columns in id order. valid_NK: which of them are in S; rows with a smaller S have some that are not.
    """

    columns_NK: Array
    valid_NK: Array


def nucleus(logits_NV: Array, top_p_N: Array, total_N: Array | None = None) -> Nucleus:
    """Finds the support S of each row.

    Ties go to the lower id, and the outcome that crosses `top_p` is in S. With `top_p` 1 every outcome with mass is,
    although rounded sums may reach 1 before.

    Args:
        logits_NV: the teacher's logits, −inf for what cannot be drawn.
        top_p_N: mass to reach, in (0, 1], float64.
        total_N: log of the mass of which top_p is the share; by default that of the row.
    """
    xp = array_namespace(logits_NV)
    vocabulary = logits_NV.shape[-1]
    if total_N is None:
        total_N = log_sum_exp(logits_NV)

    k = min(FIRST_CANDIDATES, vocabulary)
    while True:
        if k == vocabulary:
            ids_NK = descending_order(logits_NV)
        else:
            ids_NK = xp.sort(top_k_unordered(logits_NV, k), axis=-1)
            ids_NK = take_columns(ids_NK, descending_order(take_columns(logits_NV, ids_NK)))

        logits_NK = float64(xp, take_columns(logits_NV, ids_NK))
        before_NK = _mass_before(logits_NK, total_N)
        valid_NK = ((before_NK < top_p_N[:, None]) | (top_p_N == 1)[:, None]) & (
            logits_NK > -xp.inf
        )
        crossing_N1 = last_index(xp, valid_NK)[:, None]
        if k == vocabulary:
            break
        # Settled when the crossing outcome beats the last candidate, with which outsiders may tie.
        if bool((take_columns(logits_NK, crossing_N1)[:, 0] > logits_NK[:, -1]).all()):
            break
        k = min(8 * k, vocabulary)

    width = int(crossing_N1.max()) + 1
    ids_NK, valid_NK = ids_NK[:, :width], valid_NK[:, :width]
    beyond = xp.asarray(vocabulary, dtype=ids_NK.dtype, device=device(ids_NK))
    ids_NK = xp.sort(xp.where(valid_NK, ids_NK, beyond), axis=-1)
    valid_NK = ids_NK < vocabulary
    return Nucleus(xp.where(valid_NK, ids_NK, xp.zeros_like(ids_NK)), valid_NK)


def _mass_before(logits_NK: Array, total_N: Array) -> Array:
    """Mass of the candidates ranked before each one, as a share of the whole row."""
    xp = array_namespace(logits_NK)
    total_N = xp.where(
        total_N == -xp.inf, xp.zeros_like(total_N), total_N
    )  # a row with everything masked
    mass_NK = xp.exp(logits_NK - total_N[:, None])
    return running_sum(xp, mass_NK) - mass_NK

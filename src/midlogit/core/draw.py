"""Draws from rows of masses: by inverse CDF, and by Gumbel noise of each id; makes no uniforms."""

from __future__ import annotations

import numpy as np

from midlogit.core.arrays import (
    Array,
    array_namespace,
    device,
    last_index,
    row_max,
    row_sum,
    running_sum,
    take_columns,
)
from midlogit.core.noise import FIRST_BLOCK, IDS_PER_BLOCK, exponentials

TINY = 1e-300  # a mass below it counts as none, as noise over it could overflow


def masses(log_weights_NV: Array) -> Array:
    """Weights of rows of log weights, relative to each row's largest; 0 for a row that is −inf everywhere."""
    xp = array_namespace(log_weights_NV)
    peak_N = row_max(xp, log_weights_NV)
    return xp.exp(
        log_weights_NV - xp.where(xp.isfinite(peak_N), peak_N, xp.zeros_like(peak_N))[:, None]
    )


def gumbel_max(mass_NV: Array, uniform_N: Array) -> Array:
    """The drawn id of each row, first its block and then the id in it (docs/theory.md (17b)).

    An id without mass is never drawn, unless nothing has any.

    Args:
        mass_NV: masses, of any sum, of every id.
        uniform_N: uniforms in [0, 1), float64, which the noise is made of.
    """
    xp, where, size = array_namespace(mass_NV), device(mass_NV), mass_NV.shape[-1]
    starts = range(0, size, IDS_PER_BLOCK)
    mass_NB = xp.stack([row_sum(xp, mass_NV[:, at : at + IDS_PER_BLOCK]) for at in starts], axis=-1)
    blocks_B = xp.arange(len(starts), device=where) + FIRST_BLOCK
    start_N = largest(mass_NB, uniform_N, blocks_B[None, :]) * IDS_PER_BLOCK

    places_K = xp.arange(min(size, IDS_PER_BLOCK), device=where)
    ids_NK = start_N[:, None] + places_K[None, :]
    mass_NK = take_columns(mass_NV, xp.minimum(ids_NK, xp.full_like(ids_NK, size - 1)))
    mass_NK = xp.where(ids_NK < size, mass_NK, xp.zeros_like(mass_NK))
    return start_N + largest(mass_NK, uniform_N, ids_NK)


def gumbel_max_listed(mass_NU: Array, ids_NU: Array, uniform_N: Array) -> Array:
    """The column of each row that `gumbel_max` draws where only some ids have mass; NumPy alone.

    Args:
        ids_NU: the id of each column; negative where there is none, which has no mass.
    """
    rows_N1 = np.arange(len(mass_NU))[:, None]
    blocks_NU = np.maximum(ids_NU, 0) // IDS_PER_BLOCK
    mass_NB = np.zeros((len(mass_NU), 1 + int(blocks_NU.max(initial=0))))
    np.add.at(mass_NB, (rows_N1, blocks_NU), mass_NU)
    blocks_B = np.arange(mass_NB.shape[1]) + FIRST_BLOCK
    block_N = largest(mass_NB, uniform_N, blocks_B[None, :])
    return largest(np.where(blocks_NU == block_N[:, None], mass_NU, 0.0), uniform_N, ids_NU)


def largest(mass_NK: Array, uniform_N: Array, numbers_NK: Array) -> Array:
    """The column of each row whose log mass plus Gumbel noise is the largest: the least exponential noise per mass.

    Args:
        numbers_NK: of the outcomes, as `core.noise` counts them; [N, K] or [1, K].
    """
    xp = array_namespace(mass_NK)
    some_NK = mass_NK > TINY
    arrival_NK = exponentials(uniform_N, numbers_NK) / xp.where(
        some_NK, mass_NK, xp.ones_like(mass_NK)
    )
    return xp.argmin(xp.where(some_NK, arrival_NK, xp.inf), axis=-1)


def inverse_cdf(mass_NV: Array, uniform_N: Array) -> Array:
    """The drawn column of each row (docs/theory.md (17)); a column without mass is never drawn.

    Args:
        mass_NV: masses, of any sum, columns in id order.
        uniform_N: uniforms in [0, 1), float64.
    """
    xp = array_namespace(mass_NV)
    cumulative_NV = running_sum(xp, mass_NV)
    target_N1 = (uniform_N * cumulative_NV[:, -1])[:, None]
    drawn_N = xp.sum(xp.astype(cumulative_NV <= target_N1, xp.int64), axis=-1)
    return xp.minimum(drawn_N, last_index(xp, mass_NV > 0))


def stop_place(log_weights_NK: Array, uniform_N: Array, greedy_N: Array) -> Array:
    """The drawn member of each row's stop class (docs/theory.md (20b)); the first where none has mass.

    Args:
        log_weights_NK: the base's, in any scale. greedy_N: rows that take the most likely instead.
    """
    xp = array_namespace(log_weights_NK)
    drawn_N = inverse_cdf(masses(log_weights_NK), uniform_N)
    return xp.where(greedy_N, most_likely(log_weights_NK), drawn_N)


def most_likely(log_probs_NV: Array) -> Array:
    """The most likely column of each row, the lowest of several."""
    return array_namespace(log_probs_NV).argmax(log_probs_NV, axis=-1)

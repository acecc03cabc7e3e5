"""Draws by Gumbel noise from rows of masses (docs/theory.md (17)); makes no uniforms."""

from __future__ import annotations

from midlogit.core.arrays import Array, array_namespace, device, row_max, row_sum, take_columns
from midlogit.core.noise import FIRST_BLOCK, IDS_PER_BLOCK, exponentials

TINY = 1e-300  # a mass below it counts as none, as noise over it could overflow


def masses(log_weights_NV: Array) -> Array:
    """Weights of rows of log weights, relative to each row's largest; 0 for a row that is −inf everywhere."""
    xp = array_namespace(log_weights_NV)
    peak_N = row_max(xp, log_weights_NV)
    return xp.exp(
        log_weights_NV - xp.where(xp.isfinite(peak_N), peak_N, xp.zeros_like(peak_N))[:, None]
    )


def draw_columns(mass_NV: Array, uniform_N: Array, ids_NV: Array | None = None) -> Array:
    """The drawn column of each row, first its block and then the id in it (docs/theory.md (17a)).

    A column without mass is never drawn, unless no column has any.

    Args:
        mass_NV: masses, of any sum.
        uniform_N: uniforms in [0, 1), float64, which the noise is made of.
        ids_NV: the id of each column; negative for none, without mass. None where the columns are all ids in order.
    """
    return _draw_id(mass_NV, uniform_N) if ids_NV is None else _draw_of(mass_NV, uniform_N, ids_NV)


def _draw_id(mass_NV: Array, uniform_N: Array) -> Array:
    """`draw_columns` where only one block needs noise for each id."""
    xp, where, size = array_namespace(mass_NV), device(mass_NV), mass_NV.shape[-1]
    starts = range(0, size, IDS_PER_BLOCK)
    mass_NB = xp.stack([row_sum(xp, mass_NV[:, at : at + IDS_PER_BLOCK]) for at in starts], axis=-1)
    start_N = _draw_block(mass_NB, uniform_N) * IDS_PER_BLOCK

    places_K = xp.arange(min(size, IDS_PER_BLOCK), device=where)
    ids_NK = start_N[:, None] + places_K[None, :]
    mass_NK = take_columns(mass_NV, xp.minimum(ids_NK, xp.full_like(ids_NK, size - 1)))
    mass_NK = xp.where(ids_NK < size, mass_NK, xp.zeros_like(mass_NK))
    return start_N + gumbel_max(mass_NK, uniform_N, ids_NK)


def _draw_of(mass_NV: Array, uniform_N: Array, ids_NV: Array) -> Array:
    """`draw_columns` among some ids."""
    xp = array_namespace(mass_NV)
    nothing_NV = xp.zeros_like(mass_NV)
    block_NV = ids_NV // IDS_PER_BLOCK
    parts = [
        row_sum(xp, xp.where(block_NV == block, mass_NV, nothing_NV))
        for block in range(1 + max(int(xp.max(block_NV)), 0))
    ]
    block_N = _draw_block(xp.stack(parts, axis=-1), uniform_N)
    inside_NV = xp.where(block_NV == block_N[:, None], mass_NV, nothing_NV)
    return gumbel_max(inside_NV, uniform_N, ids_NV)


def _draw_block(mass_NB: Array, uniform_N: Array) -> Array:
    xp = array_namespace(mass_NB)
    numbers_B = xp.arange(mass_NB.shape[-1], device=device(mass_NB)) + FIRST_BLOCK
    return gumbel_max(mass_NB, uniform_N, numbers_B[None, :])


def gumbel_max(mass_NK: Array, uniform_N: Array, numbers_NK: Array) -> Array:
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


def most_likely(log_probs_NV: Array) -> Array:
    """The most likely column of each row, the lowest of several."""
    return array_namespace(log_probs_NV).argmax(log_probs_NV, axis=-1)

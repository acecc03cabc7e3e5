"""Inverse-CDF draws from rows of masses in column order; knows no random numbers of its own."""

from __future__ import annotations

from midlogit.core.arrays import Array, array_namespace, last_index, row_max, running_sum


def masses(log_weights_NV: Array) -> Array:
    """Weights of rows of log weights, relative to each row's largest; 0 for a row that is −inf everywhere."""
    xp = array_namespace(log_weights_NV)
    peak_N = row_max(xp, log_weights_NV)
    return xp.exp(
        log_weights_NV - xp.where(xp.isfinite(peak_N), peak_N, xp.zeros_like(peak_N))[:, None]
    )


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

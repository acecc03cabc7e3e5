"""Inverse-CDF draws from rows of log-probabilities in column order; knows no random numbers of its own."""

from __future__ import annotations

from midlogit.core.arrays import Array, array_namespace, last_index


def inverse_cdf(log_probs_NV: Array, uniform_N: Array) -> Array:
    """The drawn column of each row (docs/theory.md (17)); a column without mass is never drawn.

    Args:
        log_probs_NV: log-probabilities in float64, columns in id order.
        uniform_N: uniforms in [0, 1), float64.
    """
    xp = array_namespace(log_probs_NV)
    mass_NV = xp.exp(log_probs_NV)
    cumulative_NV = xp.cumulative_sum(mass_NV, axis=-1)
    target_N1 = (uniform_N * cumulative_NV[:, -1])[:, None]
    drawn_N = xp.sum(xp.astype(cumulative_NV <= target_N1, xp.int64), axis=-1)
    return xp.minimum(drawn_N, last_index(xp, mass_NV > 0))


def most_likely(log_probs_NV: Array) -> Array:
    """The most likely column of each row, the lowest of several."""
    return array_namespace(log_probs_NV).argmax(log_probs_NV, axis=-1)

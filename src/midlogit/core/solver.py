"""Safeguarded Newton for increasing functions of α on [0, 1], row by row; knows no particular function.

docs/theory.md section 4. Rows are independent: a row that has converged leaves the working set, so a
hard row costs the easy ones nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from midlogit.core.arrays import Array, array_namespace, device, resolution
from midlogit.core.mixture import LogPair

Function = Callable[[LogPair, Array], tuple[Array, Array]]

NEWTON_STEPS = 40  # after so many, bisection alone, which reaches the spacing of float64 in 53
MAX_STEPS = NEWTON_STEPS + 53


def increasing_root(function: Function, pair: LogPair, tolerance: float) -> Array:
    """The root of each row's function on [0, 1], or the end nearest to it.

    A function that is zero at both ends, as far as the rows' dtype can tell, is zero everywhere: α = 0.5.

    Args:
        function: (rows, α) to (value, slope) of each row, nondecreasing in α.
        tolerance: stop when |value| ≤ tolerance · min(1, slope) (docs/theory.md (11)).

    Returns:
        α_N in float64.
    """
    xp = array_namespace(pair.base_NV)
    rows, where = pair.base_NV.shape[0], device(pair.base_NV)
    zeros_N = xp.zeros(rows, dtype=xp.float64, device=where)
    ones_N = xp.ones(rows, dtype=xp.float64, device=where)
    floor = resolution(pair.base_NV)

    low_value_N, _ = function(pair, zeros_N)
    high_value_N, _ = function(pair, ones_N)
    at_low_N, at_high_N = low_value_N >= 0, high_value_N <= 0
    flat_N = (xp.abs(low_value_N) <= 16 * floor) & (xp.abs(high_value_N) <= 16 * floor)
    secant_N = -low_value_N / xp.where(high_value_N > low_value_N, high_value_N - low_value_N, ones_N)
    alpha_N = xp.where(at_low_N, zeros_N, xp.where(at_high_N, ones_N, secant_N))
    alpha_N = xp.where(flat_N, 0.5 * ones_N, alpha_N)

    active_K = xp.nonzero(~(flat_N | at_low_N | at_high_N))[0]
    current_K = xp.take(alpha_N, active_K)
    low_K, high_K = xp.zeros_like(current_K), xp.ones_like(current_K)
    working = pair.rows(active_K) if active_K.shape[0] < rows else pair
    for step in range(MAX_STEPS):
        if active_K.shape[0] == 0:
            break
        value_K, slope_K = function(working, current_K)
        low_K = xp.where(value_K < 0, current_K, low_K)
        high_K = xp.where(value_K > 0, current_K, high_K)
        goal_K = xp.maximum(tolerance * xp.minimum(slope_K, xp.ones_like(slope_K)), floor * xp.ones_like(slope_K))
        done_K = (xp.abs(value_K) <= goal_K) | (high_K - low_K <= 2.3e-16)
        alpha_N[active_K] = current_K

        newton_K = current_K - value_K / xp.where(slope_K > 0, slope_K, xp.ones_like(slope_K))
        inside_K = (slope_K > 0) & (newton_K > low_K) & (newton_K < high_K) & (step < NEWTON_STEPS)
        current_K = xp.where(inside_K, newton_K, 0.5 * (low_K + high_K))
        if xp.any(done_K):
            left_K = xp.nonzero(~done_K)[0]
            active_K, current_K = xp.take(active_K, left_K), xp.take(current_K, left_K)
            low_K, high_K = xp.take(low_K, left_K), xp.take(high_K, left_K)
            working = working.rows(left_K)
    return alpha_N

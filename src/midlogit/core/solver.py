"""Safeguarded Newton for increasing functions of α on [0, 1], row by row; knows no particular function.

docs/theory.md section 4. Rows are independent: a row that has converged leaves the working set, so a
hard row costs the easy ones nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from midlogit.core.arrays import Array, array_namespace, device, resolution
from midlogit.core.mixture import LogPair, LoneRow

Function = Callable[[LogPair | LoneRow, Array], tuple[Array, Array]]

NEWTON_STEPS = 40  # after so many, bisection alone, which reaches the spacing of float64 in 53
NO_SLOPE = 1e-300
MAX_STEPS = NEWTON_STEPS + 53
FLOAT64 = 2.0**-52  # its resolution


def increasing_root(function: Function, pair: LogPair | LoneRow, tolerance: float) -> Array:
    """The root of each row's function on [0, 1], or the end nearest to it.

    A function that is zero at both ends, as far as the rows' dtype and the rounding of the models can tell, is zero
    everywhere: α = 0.5.

    Args:
        function: (rows, α) to (value, slope) of each row, nondecreasing in α.
        tolerance: stop when |value| ≤ tolerance · min(1, slope) (docs/theory.md (11)).

    Returns:
        α_N in float64; a plain number for a LoneRow.
    """
    if isinstance(pair, LoneRow):
        return _lone_root(function, pair, tolerance)
    xp = array_namespace(pair.base_NV)
    rows, where = pair.base_NV.shape[0], device(pair.base_NV)
    zeros_N = xp.zeros(rows, dtype=xp.float64, device=where)
    ones_N = xp.ones(rows, dtype=xp.float64, device=where)
    floor = resolution(pair.base_NV)

    low_value_N, _ = function(pair, zeros_N)
    high_value_N, _ = function(pair, ones_N)
    at_low_N, at_high_N = low_value_N >= 0, high_value_N <= 0
    nothing_N = xp.maximum(pair.rounding_N, xp.full_like(pair.rounding_N, 16 * floor))
    flat_N = (xp.abs(low_value_N) <= nothing_N) & (xp.abs(high_value_N) <= nothing_N)
    rise_N = high_value_N - low_value_N
    secant_N = -low_value_N / xp.where(rise_N > 0, rise_N, 1.0)
    alpha_N = xp.where(at_low_N, 0.0, xp.where(at_high_N, 1.0, secant_N))
    alpha_N = xp.where(flat_N, 0.5, alpha_N)

    active_K = xp.nonzero(~(flat_N | at_low_N | at_high_N))[0]
    current_K = xp.take(alpha_N, active_K)
    low_K, high_K = xp.take(zeros_N, active_K), xp.take(ones_N, active_K)
    working = pair.rows(active_K) if active_K.shape[0] < rows else pair
    for step in range(MAX_STEPS):
        if active_K.shape[0] == 0:
            break
        value_K, slope_K = function(working, current_K)
        below_K = value_K < 0
        low_K, high_K = xp.where(below_K, current_K, low_K), xp.where(below_K, high_K, current_K)
        goal_K = xp.clip(tolerance * slope_K, floor, max(tolerance, floor))
        done_K = (xp.abs(value_K) <= goal_K) | (high_K - low_K <= 2.3e-16)
        alpha_N[active_K] = current_K
        left_K = xp.nonzero(~done_K)[0]
        if 0 < left_K.shape[0] < active_K.shape[0]:
            value_K, slope_K, active_K, current_K, low_K, high_K = (
                xp.take(x_K, left_K) for x_K in (value_K, slope_K, active_K, current_K, low_K, high_K)
            )
            working = working.rows(left_K)
        elif left_K.shape[0] == 0:
            break

        # Without a slope the step leaves the bracket, and the row is halved.
        newton_K = current_K - value_K / xp.where(slope_K > 0, slope_K, NO_SLOPE)
        inside_K = (newton_K > low_K) & (newton_K < high_K) & (step < NEWTON_STEPS)
        current_K = xp.where(inside_K, newton_K, 0.5 * (low_K + high_K))
    return alpha_N


def _lone_root(function: Function, row: LoneRow, tolerance: float) -> float:
    """`increasing_root` of one row: the same steps on plain numbers."""
    (low_value, _), (high_value, _) = function(row, 0.0), function(row, 1.0)
    if max(abs(low_value), abs(high_value)) <= max(row.rounding, 16 * FLOAT64):
        return 0.5
    if low_value >= 0 or high_value <= 0:
        return 0.0 if low_value >= 0 else 1.0
    low, high = 0.0, 1.0
    alpha: float = -low_value / (high_value - low_value)
    for step in range(MAX_STEPS):
        value, slope = function(row, alpha)
        low, high = (alpha, high) if value < 0 else (low, alpha)
        if abs(value) <= max(tolerance * min(slope, 1.0), FLOAT64) or high - low <= 2.3e-16:
            break
        newton = alpha - value / slope if slope > 0 and step < NEWTON_STEPS else low
        alpha = newton if low < newton < high else 0.5 * (low + high)
    return alpha

"""Safeguarded Newton for the root of a rule's residual on [0, 1], row by row; knows no particular rule.

docs/theory.md section 4. Rows are independent: a row that has converged leaves the working set, so hard rows do not
slow down easy ones.
"""

from __future__ import annotations

from midlogit.core.arrays import Array, array_namespace, device, resolution
from midlogit.core.mixture import LogPair, moments
from midlogit.core.rules import AlphaRule

NEWTON_STEPS = 40  # after these only bisection, which reaches the spacing of float64 in 53 steps
NO_SLOPE = 1e-300
MAX_STEPS = NEWTON_STEPS + 53
NARROWEST = 2.3e-16  # a bracket of this width cannot be halved in float64


def solve(rule: AlphaRule, pair: LogPair, tolerance: float) -> Array:
    """α of each row in float64 [N]: the root of the rule's residual, or the end of [0, 1] nearest to it.

    A residual that is zero at both ends, as far as the rows' dtype and the rounding of the models can tell, is zero
    everywhere: α = 0.5.

    Args:
        pair: rows, each with a common support.
        tolerance: stop when |value| ≤ tolerance · min(1, slope) (docs/theory.md (11)).
    """
    xp = array_namespace(pair.base_NV)
    num_rows, where = pair.base_NV.shape[0], device(pair.base_NV)
    if rule.fixed_alpha is not None:
        return xp.full(num_rows, rule.fixed_alpha, dtype=xp.float64, device=where)

    zeros_N = xp.zeros(num_rows, dtype=xp.float64, device=where)
    ones_N = xp.ones(num_rows, dtype=xp.float64, device=where)
    alpha_N, open_N = _start(rule, pair, zeros_N, ones_N)

    active_K = xp.nonzero(open_N)[0]
    if active_K.shape[0] == 0:
        return alpha_N
    current_K = xp.take(alpha_N, active_K)
    low_K, high_K = xp.take(zeros_N, active_K), xp.take(ones_N, active_K)
    working = pair.rows(active_K) if active_K.shape[0] < num_rows else pair
    floor = resolution(pair.base_NV)

    for step in range(MAX_STEPS):
        value_K, slope_K = _residual(rule, working, current_K)
        below_K = value_K < 0
        low_K, high_K = xp.where(below_K, current_K, low_K), xp.where(below_K, high_K, current_K)

        goal_K = xp.clip(tolerance * slope_K, floor, max(tolerance, floor))
        done_K = (xp.abs(value_K) <= goal_K) | (high_K - low_K <= NARROWEST)
        alpha_N[active_K] = current_K
        left_K = xp.nonzero(~done_K)[0]
        if left_K.shape[0] == 0:
            break
        if left_K.shape[0] < active_K.shape[0]:
            value_K, slope_K, active_K, current_K, low_K, high_K = (
                xp.take(x_K, left_K)
                for x_K in (value_K, slope_K, active_K, current_K, low_K, high_K)
            )
            working = working.rows(left_K)

        # Without a slope the step leaves the bracket, and the row is halved.
        newton_K = current_K - value_K / xp.where(slope_K > 0, slope_K, NO_SLOPE)
        inside_K = (newton_K > low_K) & (newton_K < high_K) & (step < NEWTON_STEPS)
        current_K = xp.where(inside_K, newton_K, 0.5 * (low_K + high_K))
    return alpha_N


def _start(rule: AlphaRule, pair: LogPair, zeros_N: Array, ones_N: Array) -> tuple[Array, Array]:
    """The first α of each row, and which rows have a root strictly between the ends."""
    xp = array_namespace(pair.base_NV)
    low_value_N, _ = _residual(rule, pair, zeros_N)
    high_value_N, _ = _residual(rule, pair, ones_N)
    at_low_N, at_high_N = low_value_N >= 0, high_value_N <= 0

    nothing_N = xp.maximum(
        pair.rounding_N, xp.full_like(pair.rounding_N, 16 * resolution(pair.base_NV))
    )
    flat_N = (xp.abs(low_value_N) <= nothing_N) & (xp.abs(high_value_N) <= nothing_N)

    rise_N = high_value_N - low_value_N
    secant_N = -low_value_N / xp.where(rise_N > 0, rise_N, 1.0)
    alpha_N = xp.where(at_low_N, 0.0, xp.where(at_high_N, 1.0, secant_N))
    return xp.where(flat_N, 0.5, alpha_N), ~(flat_N | at_low_N | at_high_N)


def _residual(rule: AlphaRule, pair: LogPair, alpha_N: Array) -> tuple[Array, Array]:
    return rule.residual(alpha_N, *moments(pair, alpha_N))

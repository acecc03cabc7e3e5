"""Certified bounds on α and q* for rows of which only the most likely outcomes are known; knows boxes, no server.

docs/theory.md section 10. Weights are kept as logarithms. Arrays are NumPy on the CPU, because truncated rows come
from servers. Shapes: N rows, U outcomes of the union, G values of α tried at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

Array = Any

LOG_ZERO = (
    -1e15
)  # log weight of nothing: finite, so that 0 · (−∞) never arises, and exp gives 0 at every α used
TINY = 1e-300
EDGE = 2.0**-9  # α is tried within [EDGE, 1 − EDGE], where e^(1/α) is representable
ROUNDING = 2.0**-40
MASS_PRECISION = 4e-6  # by which a sum of reported float32 probabilities may be off
STEPS = 2.0 ** np.arange(-17, 1)
REFINEMENT = np.arange(1, 8) / 8

Bounds = Callable[[Array], tuple[Array, Array]]


@dataclass(frozen=True)
class Boxes:
    """All pairs of rows that agree with the lists (docs/theory.md (21), (22), (32)).

    Attributes:
        base_lo_NU, base_hi_NU, teacher_lo_NU, teacher_hi_NU: log weights, LOG_ZERO for nothing.
        base_boxed_NU, teacher_boxed_NU: outcomes bounded by their own box; the tail bounds the others.
        base_tail_N, teacher_tail_N: total weight that is not listed.
        base_total_lo_N, base_total_hi_N, teacher_total_lo_N, teacher_total_hi_N: log Z.
    """

    base_lo_NU: Array
    base_hi_NU: Array
    teacher_lo_NU: Array
    teacher_hi_NU: Array
    base_boxed_NU: Array
    teacher_boxed_NU: Array
    base_tail_N: Array
    teacher_tail_N: Array
    base_total_lo_N: Array
    base_total_hi_N: Array
    teacher_total_lo_N: Array
    teacher_total_hi_N: Array

    @property
    def exact(self) -> Array:
        """Rows of which everything is known."""
        closed_NU = (self.base_lo_NU == self.base_hi_NU) & (
            self.teacher_lo_NU == self.teacher_hi_NU
        )
        closed_N = np.all(closed_NU, axis=-1)
        return closed_N & (self.base_tail_N == 0) & (self.teacher_tail_N == 0)

    def rows(self, index_N: Array) -> Boxes:
        """The boxes of some rows."""
        return Boxes(*(getattr(self, field.name)[index_N] for field in fields(self)))

    @cached_property
    def _shift_lo_N(self) -> Array:
        return self.teacher_total_lo_N - self.base_total_hi_N

    @cached_property
    def _shift_hi_N(self) -> Array:
        return self.teacher_total_hi_N - self.base_total_lo_N

    def slope(self, alpha_NG: Array) -> tuple[Array, Array]:
        """Bounds on F′(α)·D(α) that hold for every completion, rounding included (docs/theory.md (25), (25a))."""
        alpha = alpha_NG[:, :, None]
        base_lo, base_hi = self.base_lo_NU[:, None, :], self.base_hi_NU[:, None, :]

        shift = self._shift_lo_N[:, None, None]
        at_ends = []
        for log_b in (
            self.teacher_lo_NU[:, None, :] - shift,
            self.teacher_hi_NU[:, None, :] - shift,
        ):
            log_a = np.minimum(np.maximum(log_b - 1 / (1 - alpha), base_lo), base_hi)
            at_ends.append(_phi(alpha, log_a, log_b))
        most = np.where(self.teacher_boxed_NU[:, None, :], np.maximum(*at_ends), 0.0)
        tail = (self.teacher_tail_N * np.exp(-self._shift_lo_N))[:, None] / (np.e * (1 - alpha_NG))
        slack = ROUNDING * (np.abs(most) + np.exp((1 - alpha) * base_hi + alpha * log_b)).sum(
            axis=-1
        )
        upper = np.exp(alpha_NG * self._shift_lo_N[:, None]) * (most.sum(axis=-1) + tail + slack)

        shift = self._shift_hi_N[:, None, None]
        low, high = self.teacher_lo_NU[:, None, :] - shift, self.teacher_hi_NU[:, None, :] - shift
        at_ends = []
        for log_a in (base_lo, base_hi):
            log_b = np.minimum(np.maximum(log_a - 1 / alpha, low), high)
            at_ends.append(_phi(alpha, log_a, log_b))
        least = np.where(self.base_boxed_NU[:, None, :], np.minimum(*at_ends), 0.0)
        tail = self.base_tail_N[:, None] / (np.e * alpha_NG)
        slack = ROUNDING * (np.abs(least) + np.exp((1 - alpha) * base_hi + alpha * high)).sum(
            axis=-1
        )
        lower = np.exp(alpha_NG * self._shift_hi_N[:, None]) * (least.sum(axis=-1) - tail - slack)
        return lower, upper

    def divergence(self, alpha_NG: Array) -> tuple[Array, Array]:
        """Bounds on KL(q‖p) at α (docs/theory.md (31))."""
        downward, upward = self._slope_range(alpha_NG)
        low, high = self._weights(alpha_NG)
        with np.errstate(divide="ignore"):
            most = (
                alpha_NG * upward
                - np.log(low)
                + _blend(alpha_NG, self.base_total_hi_N, self.teacher_total_hi_N)
            )
            least = (
                -alpha_NG * downward
                - np.log(high)
                + _blend(alpha_NG, self.base_total_lo_N, self.teacher_total_lo_N)
            )
        return least, most

    def interval(self, alpha_N: Array, bounds: Bounds) -> tuple[Array, Array]:
        """[α_lo, α_hi] that holds the root of an increasing function (docs/theory.md (26)).

        Tries values on both sides at growing distances, then some between the first certified and the last that is
        not. An end may be any value at which the sign is certified.

        Args:
            alpha_N: the estimate. bounds: α_NG to certified (lower, upper) bounds of the function, up to a
                positive factor.
        """
        steps = STEPS.size
        left_N, right_N, left_in_N, right_in_N = self._nearest(
            alpha_N,
            np.broadcast_to(STEPS, (len(alpha_N), steps)),
            np.broadcast_to(STEPS, (len(alpha_N), steps)),
            bounds,
        )

        finer = [
            inner_N[:, None]
            + REFINEMENT
            * np.maximum(np.where(np.isfinite(at_N), at_N, inner_N) - inner_N, 0.0)[:, None]
            for at_N, inner_N in ((left_N, left_in_N), (right_N, right_in_N))
        ]
        finer_left_N, finer_right_N, _, _ = self._nearest(alpha_N, finer[0], finer[1], bounds)

        # Where nothing was certified the first time, nothing finer can be.
        low_N = alpha_N - np.where(np.isfinite(left_N), np.minimum(left_N, finer_left_N), np.inf)
        high_N = alpha_N + np.where(
            np.isfinite(right_N), np.minimum(right_N, finer_right_N), np.inf
        )
        return np.maximum(low_N, 0.0), np.minimum(high_N, 1.0)

    def _nearest(
        self, alpha_N: Array, left_NG: Array, right_NG: Array, bounds: Bounds
    ) -> tuple[Array, Array, Array, Array]:
        """The first certified distance to the left and to the right (∞ for none), and the distances before them."""
        count = left_NG.shape[-1]
        tried_NG = np.concatenate(
            [alpha_N[:, None] - left_NG, alpha_N[:, None] + right_NG], axis=-1
        )
        tried_NG = np.minimum(np.maximum(tried_NG, EDGE), 1 - EDGE)
        lower_NG, upper_NG = bounds(tried_NG)

        rows_N = np.arange(len(alpha_N))
        found: list[Array] = []
        inner: list[Array] = []
        for good_NG, away_NG, distance_NG in (
            (upper_NG[:, :count] < 0, alpha_N[:, None] - tried_NG[:, :count], left_NG),
            (lower_NG[:, count:] > 0, tried_NG[:, count:] - alpha_N[:, None], right_NG),
        ):
            at_N = np.argmax(good_NG, axis=-1)
            found.append(
                np.where(good_NG[rows_N, at_N], np.maximum(away_NG[rows_N, at_N], 0.0), np.inf)
            )
            inner.append(np.where(at_N > 0, distance_NG[rows_N, np.maximum(at_N - 1, 0)], 0.0))
        return found[0], found[1], inner[0], inner[1]

    def alpha_bound(self, alpha_N: Array, low_N: Array, high_N: Array) -> Array:
        """Bound on |α̂ − α*| (docs/theory.md (26a))."""
        return np.maximum(alpha_N - low_N, high_N - alpha_N)

    def equal_kl(self, alpha_N: Array) -> tuple[Array, Array]:
        """Bounds on |α̂ − α*| and on the total variation that it costs, for F′ = 0 (docs/theory.md (27), (28))."""
        low_N, high_N = self.interval(alpha_N, self.slope)
        tried_N = np.clip(alpha_N, EDGE, 1 - EDGE)
        downward_N, upward_N = (x[:, 0] for x in self._slope_range(tried_N[:, None]))
        # F′ rises: above the last α tried nothing bounds it from above, below the first nothing from below.
        upward_N = np.where(alpha_N > tried_N, np.inf, upward_N)
        downward_N = np.where(alpha_N < tried_N, np.inf, downward_N)

        left_N, right_N = np.maximum(alpha_N - low_N, 0.0), np.maximum(high_N - alpha_N, 0.0)
        cost_N = np.maximum(_product(left_N, upward_N), _product(right_N, downward_N))
        return self.alpha_bound(alpha_N, low_N, high_N), np.minimum(0.5 * np.sqrt(cost_N), 1.0)

    def kl_budget(self, alpha_N: Array, epsilon: float) -> tuple[Array, Array]:
        """`equal_kl` for the largest α with KL(q‖p) ≤ ε (docs/theory.md (31), (31a))."""

        def excess(alpha_NG: Array) -> tuple[Array, Array]:
            least, most = self.divergence(alpha_NG)
            return least - epsilon - ROUNDING, most - epsilon + ROUNDING

        low_N, high_N = self.interval(alpha_N, excess)
        bound_N = self.alpha_bound(alpha_N, low_N, high_N)

        left_N, right_N = np.minimum(low_N, alpha_N), np.maximum(high_N, alpha_N)
        tried_N2 = np.clip(np.stack([left_N, right_N], axis=1), EDGE, 1 - EDGE)
        downward_N2, upward_N2 = self._slope_range(tried_N2)
        cost_N = 0.5 * np.sqrt(bound_N * np.maximum(upward_N2[:, 1] + downward_N2[:, 0], 0.0))
        inside_N = (left_N >= EDGE) & (right_N <= 1 - EDGE)
        cost_N = np.where(inside_N, cost_N, 1.0)

        # Neither α takes q further from p than the larger of the two divergences allows.
        _, most_N1 = self.divergence(np.clip(alpha_N, EDGE, 1 - EDGE)[:, None])
        reach_N = np.sqrt(np.maximum(most_N1[:, 0], epsilon) / 2)
        cost_N = np.where(alpha_N <= 1 - EDGE, np.fmin(cost_N, reach_N), cost_N)
        return bound_N, np.where(bound_N == 0, 0.0, np.minimum(cost_N, 1.0))

    def at_alpha(self, alpha_N: Array, base_NU: Array, teacher_NU: Array) -> Array:
        """Bound on TV(q̂, q_α̂), both at α̂ (docs/theory.md (29)).

        Args:
            base_NU, teacher_NU: the log weights sampled with, within their boxes.
        """
        alpha = alpha_N[:, None]
        used_NU = np.exp(_mix(alpha, base_NU, teacher_NU))
        low_NU = np.exp(_mix(alpha, self.base_lo_NU, self.teacher_lo_NU))
        high_NU = np.exp(_mix(alpha, self.base_hi_NU, self.teacher_hi_NU))

        below_N = np.maximum(used_NU - low_NU, 0.0).sum(axis=-1)
        above_N = np.maximum(high_NU - used_NU, 0.0).sum(axis=-1) + self._tail(alpha)[:, 0]

        total_N = used_NU.sum(axis=-1)
        some_N = (total_N > 0) & (total_N - below_N + above_N > 0)
        total_N, exact_N = (
            np.where(some_N, x, 1.0) for x in (total_N, total_N - below_N + above_N)
        )
        return np.where(
            some_N, np.minimum(np.maximum(below_N / total_N, above_N / exact_N), 1.0), 1.0
        )

    def _tail(self, alpha_NG: Array) -> Array:
        """Bound on the weight of everything unlisted under the mixture, by Hölder's inequality."""
        return (
            self.base_tail_N[:, None] ** (1 - alpha_NG) * self.teacher_tail_N[:, None] ** alpha_NG
        )

    def _weights(self, alpha_NG: Array) -> tuple[Array, Array]:
        """Bounds on D(α)."""
        alpha = alpha_NG[:, :, None]
        low = np.exp(_mix(alpha, self.base_lo_NU[:, None, :], self.teacher_lo_NU[:, None, :])).sum(
            axis=-1
        )
        high = np.exp(_mix(alpha, self.base_hi_NU[:, None, :], self.teacher_hi_NU[:, None, :])).sum(
            axis=-1
        )
        return low, high + self._tail(alpha_NG)

    def _slope_range(self, alpha_NG: Array) -> tuple[Array, Array]:
        """(f_lo, f_hi) of docs/theory.md (27): −f_lo ≤ F′(α) ≤ f_hi, infinite where D may vanish."""
        lower, upper = self.slope(alpha_NG)
        total, _ = self._weights(alpha_NG)
        with np.errstate(divide="ignore", invalid="ignore"):
            downward = np.where(lower < 0, -lower / total, 0.0)
            upward = np.where(upper > 0, upper / total, 0.0)
        return downward, upward


def log_or_tiny(x_N: Array) -> Array:
    """log of weights, that of a tiny number for 0."""
    return np.log(np.maximum(x_N, TINY))


def unlisted_weight(
    mass_N: Array, cap_N: Array, allowed_N: Array, masked_N: Array, inv_temperature_N: Array
) -> tuple[Array, Array]:
    """The least and the most that unlisted allowed ids weigh together once tempered (docs/theory.md (22)).

    Args:
        mass_N: probability outside the list. cap_N: largest probability of an unlisted id.
        allowed_N, masked_N: how many unlisted ids may be drawn and how many may not.
        inv_temperature_N: 1 / temperature.
    """
    some_N = (mass_N > 0) & (allowed_N > 0)
    cap_N = np.where(some_N, np.minimum(cap_N, mass_N), 1.0)
    if (inv_temperature_N == 1).all():  # untempered weights
        least_N = np.maximum(mass_N - cap_N * masked_N, 0.0)
        return np.where(some_N, least_N, 0.0), np.where(some_N, mass_N, 0.0)
    allowed_N = np.where(some_N, allowed_N, 1)

    def ends(mass_N: Array) -> tuple[Array, Array]:
        return mass_N * cap_N ** (inv_temperature_N - 1), allowed_N ** (
            1 - inv_temperature_N
        ) * mass_N**inv_temperature_N

    least_N = np.minimum(*ends(np.maximum(mass_N - cap_N * masked_N, 0.0)))
    return np.where(some_N, least_N, 0.0), np.where(some_N, np.maximum(*ends(mass_N)), 0.0)


def _phi(alpha: Array, log_a: Array, log_b: Array) -> Array:
    """φ of docs/theory.md (23), from logarithms."""
    return np.exp((1 - alpha) * log_a + alpha * log_b) * (log_b - log_a)


def _mix(alpha: Array, base: Array, teacher: Array) -> Array:
    return (1 - alpha) * base + alpha * teacher


def _blend(alpha_NG: Array, base_N: Array, teacher_N: Array) -> Array:
    return (1 - alpha_NG) * base_N[:, None] + alpha_NG * teacher_N[:, None]


def _product(distance_N: Array, slope_N: Array) -> Array:
    """distance · slope, 0 where there is no distance and 4 (a bound of 1) where the slope is not bounded."""
    known_N = np.isfinite(slope_N)
    return np.where(
        distance_N == 0, 0.0, np.where(known_N, distance_N * np.where(known_N, slope_N, 0.0), 4.0)
    )

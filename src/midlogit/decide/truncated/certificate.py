"""Bounds on the distance between the distribution sampled from two truncated lists and q*; draws nothing.

docs/theory.md sections 10.1 and 10.3 to 10.5. Arrays are NumPy: N rows, U columns of the union.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from midlogit.core.arrays import Array, take_columns
from midlogit.core.bounds import LOG_ZERO, Boxes, log_or_tiny
from midlogit.decide.rows import Certificate, Sampled


@dataclass(frozen=True, slots=True)
class Weights:
    """Boxes of one model's tempered, masked, merged weights, scaled to a peak of 1 (docs/theory.md (21), (22)).

    Attributes:
        low_NU, high_NU: log ends of each column. total_N: sum of what is known.
        least_N, most_N: ends of the sum of what is not. cap_N: the most that one unlisted outcome weighs.
        peak_N: log of the scale.
    """

    low_NU: Array
    high_NU: Array
    total_N: Array
    least_N: Array
    most_N: Array
    cap_N: Array
    peak_N: Array


def certify(sampled: Sampled, base: Weights, teacher: Weights, coverage_N: Array) -> Certificate:
    """The bounds of each row (docs/theory.md (26a), (30)).

    Args:
        base, teacher: boxes of the weights that were sampled from.
    """
    alpha_N, solved_N = sampled.alpha_N, sampled.solved_N
    base_NU, teacher_NU = (
        np.maximum(log_NU - weights.peak_N[:, None], LOG_ZERO)
        for log_NU, weights in zip(sampled.log_weights, (base, teacher), strict=True)
    )
    if sampled.support is None:
        boxes, sound_N = _boxes(base, teacher), np.ones(len(alpha_N), dtype=bool)
    else:
        used_NU = np.zeros(base_NU.shape, dtype=bool)
        columns_NK, valid_NK = sampled.support
        np.logical_or.at(used_NU, (np.arange(len(used_NU))[:, None], columns_NK), valid_NK)
        base_NU, teacher_NU = (np.where(used_NU, x_NU, LOG_ZERO) for x_NU in (base_NU, teacher_NU))
        top_p_N = np.asarray([s.top_p or 1.0 for s in sampled.rows.settings])
        boxes, sound_N = _boxes_of_nucleus(base, teacher, used_NU, top_p_N)
    exact_N = boxes.exact & sound_N

    # What the error of α costs, then what the error of the weights costs at that α.
    alpha_bound_N, cost_N = np.zeros_like(alpha_N), np.zeros_like(alpha_N)
    open_N = np.flatnonzero(solved_N & sound_N & ~exact_N)
    if len(open_N):
        rule = sampled.rows.settings[0].rule
        alpha_bound_N[open_N], cost_N[open_N] = rule.certify(boxes.rows(open_N), alpha_N[open_N])
    bound_N = np.ones_like(alpha_N)
    open_N = np.flatnonzero(sound_N & ~exact_N)
    if len(open_N):
        at_alpha_N = boxes.rows(open_N).at_alpha(
            alpha_N[open_N], base_NU[open_N], teacher_NU[open_N]
        )
        bound_N[open_N] = np.minimum(at_alpha_N + cost_N[open_N], 1.0)

    return Certificate(
        coverage_N,
        np.where(sound_N | ~solved_N, alpha_bound_N, 1.0),
        np.where(exact_N, 0.0, bound_N),
    )


def _boxes(base: Weights, teacher: Weights) -> Boxes:
    """Boxes of rows without a support constraint."""
    return Boxes(
        base.low_NU, base.high_NU, teacher.low_NU, teacher.high_NU,
        base.low_NU > LOG_ZERO, teacher.low_NU > LOG_ZERO,
        base.most_N, teacher.most_N,
        np.log(base.total_N + base.least_N), np.log(base.total_N + base.most_N),
        np.log(teacher.total_N + teacher.least_N), np.log(teacher.total_N + teacher.most_N),
    )  # fmt: skip


def _boxes_of_nucleus(
    base: Weights, teacher: Weights, used_NU: Array, top_p_N: Array
) -> tuple[Boxes, Array]:
    """Boxes of rows constrained to the teacher's nucleus S, and which of them are sound (docs/theory.md (32) to (32c)).

    Columns are in S for every completion (sure), for some (perhaps) or for none; so may unlisted ids be.

    Args:
        used_NU: the columns that were sampled from.
    """
    low_NU, high_NU = np.exp(teacher.low_NU), np.exp(teacher.high_NU)
    needed_lo_N = top_p_N * (teacher.total_N + teacher.least_N)
    needed_hi_N = top_p_N * (teacher.total_N + teacher.most_N)
    members = _members(teacher, used_NU, top_p_N, needed_lo_N, needed_hi_N)
    sure_NU, perhaps_NU, beyond_N = members
    base_lo_N, base_hi_N = members.mass(base)
    teacher_lo_N, teacher_hi_N = members.mass(teacher)

    # An S that holds more than is sure holds less than top_p and one outcome that is not.
    settled_N = ~beyond_N & (sure_NU == perhaps_NU).all(axis=-1)
    last_N = np.max(np.where(perhaps_NU & ~sure_NU, high_NU, 0.0), axis=-1)
    last_N = np.maximum(last_N, np.where(beyond_N, teacher.cap_N, 0.0))
    sure_hi_N = np.where(sure_NU, high_NU, 0.0).sum(axis=-1)
    most_N = np.maximum(sure_hi_N, needed_hi_N + last_N)
    teacher_hi_N = np.where(settled_N, teacher_hi_N, np.minimum(teacher_hi_N, most_N))
    teacher_lo_N = np.where(settled_N, teacher_lo_N, np.maximum(teacher_lo_N, needed_lo_N))
    sure_lo_N = np.where(sure_NU, low_NU, 0.0).sum(axis=-1)
    rest_N = np.clip(needed_hi_N + last_N - sure_lo_N, 0.0, teacher.most_N)

    sound_N = (base_lo_N > 0) & (teacher_lo_N > 0)
    totals = [
        log_or_tiny(np.where(sound_N, x_N, 1.0))
        for x_N in (base_lo_N, base_hi_N, teacher_lo_N, teacher_hi_N)
    ]
    boxed = [
        perhaps_NU & (~beyond_N[:, None] | (weights.low_NU > LOG_ZERO))
        for weights in (base, teacher)
    ]
    base_ends, teacher_ends = members.ends(base), members.ends(teacher)
    boxes = Boxes(
        base_ends[0], base_ends[1], teacher_ends[0], teacher_ends[1], boxed[0], boxed[1],
        np.where(beyond_N, base.most_N, 0.0), np.where(beyond_N, rest_N, 0.0),
        totals[0], totals[1], totals[2], totals[3],
    )  # fmt: skip
    return boxes, sound_N


class _Members(NamedTuple):
    """Columns that are in S for every completion of the lists, for some, and rows whose unlisted ids may be in S."""

    sure_NU: Array
    perhaps_NU: Array
    beyond_N: Array

    def ends(self, weights: Weights) -> tuple[Array, Array]:
        """Log ends of each column's weight in S."""
        low_NU = np.where(self.sure_NU, weights.low_NU, LOG_ZERO)
        return low_NU, np.where(self.perhaps_NU, weights.high_NU, LOG_ZERO)

    def mass(self, weights: Weights) -> tuple[Array, Array]:
        """Ends of the weight of S."""
        low_NU, width_NU = np.exp(weights.low_NU), np.exp(weights.high_NU) - np.exp(weights.low_NU)
        certain_N = np.where(self.sure_NU, low_NU, 0.0).sum(axis=-1)
        known_N = np.where(self.perhaps_NU, low_NU, 0.0).sum(axis=-1)
        missing_N = np.where(self.perhaps_NU, width_NU, 0.0).sum(axis=-1)
        unlisted_N = np.where(self.beyond_N, weights.most_N, np.minimum(missing_N, weights.most_N))
        return certain_N, known_N + unlisted_N


def _members(
    teacher: Weights, used_NU: Array, top_p_N: Array, needed_lo_N: Array, needed_hi_N: Array
) -> _Members:
    """The columns of S.

    Args:
        needed_lo_N, needed_hi_N: ends of the mass that S must reach.
    """
    low_NU, high_NU = np.exp(teacher.low_NU), np.exp(teacher.high_NU)
    before_lo_NU, before_hi_NU = _mass_before(teacher, low_NU, high_NU)

    present_NU = high_NU > 0
    all_N1 = (top_p_N == 1)[:, None]  # S is the whole support, whatever rounding makes of sums
    certain_NU = (before_hi_NU < needed_lo_N[:, None]) | all_N1
    possible_NU = (before_lo_NU < needed_hi_N[:, None]) | all_N1
    sure_NU = present_NU & (low_NU > 0) & certain_NU
    perhaps_NU = (present_NU & possible_NU) | used_NU

    above_cap_N = np.where(low_NU > teacher.cap_N[:, None], low_NU, 0.0).sum(axis=-1)
    beyond_N = (teacher.most_N > 0) & ((above_cap_N < needed_hi_N) | (top_p_N == 1))
    return _Members(sure_NU, perhaps_NU, beyond_N)


def _mass_before(teacher: Weights, low_NU: Array, high_NU: Array) -> tuple[Array, Array]:
    """Bounds on the total weight of the outcomes ranked before each column (docs/theory.md (32a))."""
    fixed_NU = np.where(low_NU == high_NU, low_NU, 0.0)
    order_NU = np.argsort(-fixed_NU, axis=-1, stable=True)
    sorted_NU = take_columns(fixed_NU, order_NU)
    ranked_NU = np.empty_like(fixed_NU)
    np.put_along_axis(ranked_NU, order_NU, np.cumsum(sorted_NU, axis=-1) - sorted_NU, axis=-1)

    least_NU, most_NU = ranked_NU, ranked_NU
    # At most one listed outcome is known only within a box: a stop class of which some members are listed.
    boxed_NU = (low_NU > 0) & (low_NU < high_NU)
    lead_lo_N1, lead_hi_N1 = (
        np.where(boxed_NU, x_NU, 0.0).sum(axis=-1)[:, None] for x_NU in (low_NU, high_NU)
    )
    least_NU = least_NU + np.where(lead_lo_N1 > high_NU, lead_lo_N1, 0.0)
    most_NU = most_NU + np.where((lead_hi_N1 >= low_NU) & ~boxed_NU, lead_hi_N1, 0.0)

    # Ids that the teacher did not list come before whatever does not exceed their cap.
    most_NU = most_NU + np.where(teacher.cap_N[:, None] >= low_NU, teacher.most_N[:, None], 0.0)

    # A column that is itself loose ranks after what exceeds its upper end, and before what is below its lower end.
    loose_NU = low_NU < high_NU
    if loose_NU.any():
        above_N = [
            np.where(fixed_NU > end_N1, fixed_NU, 0.0).sum(axis=-1)[:, None]
            for end_N1 in (
                np.where(boxed_NU, high_NU, 0.0).sum(axis=-1)[:, None],
                teacher.cap_N[:, None],
            )
        ]
        least_NU = np.where(boxed_NU, above_N[0], np.where(loose_NU, above_N[1], least_NU))
        at_least_N1 = np.where(fixed_NU >= lead_lo_N1, fixed_NU, 0.0).sum(axis=-1)[:, None]
        unlisted_N1 = np.where(teacher.cap_N[:, None] >= lead_lo_N1, teacher.most_N[:, None], 0.0)
        most_NU = np.where(boxed_NU, at_least_N1 + unlisted_N1, most_NU)
    return least_NU, most_NU

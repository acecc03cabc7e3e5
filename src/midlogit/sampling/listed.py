"""Rows of which a server lists only some ids: their columns, the estimate of what is missing, the certificate.

Knows lists of log-probabilities and the outcomes drawn from (docs/theory.md section 10); no server.
Arrays are NumPy: N rows, U ids of either list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from midlogit.core.arrays import Array, take_columns
from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import AlphaRule
from midlogit.core.truncation import LOG_ZERO, MASS_PRECISION, Boxes, unseen

if TYPE_CHECKING:
    from midlogit.sampling.policy import RowSettings


@dataclass(frozen=True, slots=True)
class Listed:
    """What one model said of one position.

    Attributes:
        logprobs: log-probability by id, listed or scored.
        floor: no id that is not in `logprobs` has a higher log-probability.
        size: ids that the model has.
    """

    logprobs: dict[int, float]
    floor: float
    size: int


@dataclass(frozen=True, slots=True)
class Certificate:
    """Per row: how much was seen, and how far what was sampled from can be from the exact q*.

    Attributes:
        coverage_N: mass of the reported ids, of the model of which less was seen.
        alpha_bound_N: |α − α*| is at most this. bound_N: the total variation is.
    """

    coverage_N: Array
    alpha_bound_N: Array
    bound_N: Array


@dataclass(frozen=True, slots=True)
class Side:
    """One model's part of N truncated rows.

    Attributes:
        values_NU: log-probabilities; where not known, the estimate (docs/theory.md (33)) or −inf.
        known_NU: reported values.
        mass_N: probability that was not reported. cap_N: the largest that an unreported id may have.
        sizes_N: ids of the model.
    """

    values_NU: Array
    known_NU: Array
    mass_N: Array
    cap_N: Array
    sizes_N: Array


@dataclass(frozen=True, slots=True)
class Truncation:
    """N rows of two truncated lists on common columns; build with `Truncation.of`."""

    base: Side
    teacher: Side
    ids_NU: Array
    outcomes: Outcomes
    may_end_N: Array
    heat_N: Array
    vocabulary: int
    drawable_NU: Array

    @classmethod
    def of(
        cls,
        pairs: Sequence[tuple[Listed, Listed]],
        outcomes: Outcomes,
        may_end_N: Array,
        temperature_N: Array,
        vocabulary: int,
    ) -> Truncation:
        """The union of both lists of each row, in id order.

        The stop class brings all its members along as soon as one is listed.

        Args:
            pairs: base and teacher lists of each row.
            vocabulary: ids below it are drawn from; the rest is some model's padding.
        """
        stops = set(outcomes.stop_ids) if outcomes.merged else set()
        unions = []
        for base, teacher in pairs:
            union = base.logprobs.keys() | teacher.logprobs.keys()
            unions.append(sorted(union | stops if not stops.isdisjoint(union) else union))
        width = max(map(len, unions))
        ids_NU = np.array([union + [-1] * (width - len(union)) for union in unions])
        ids_NU = np.where(ids_NU < vocabulary, ids_NU, -1)
        drawable_NU = outcomes.drawable(ids_NU, may_end_N)
        sides = [
            _side(lists, unions, width, drawable_NU, outcomes.stop_columns(ids_NU), ids_NU == outcomes.stop_outcome)
            for lists in zip(*pairs, strict=True)
        ]
        return cls(sides[0], sides[1], ids_NU, outcomes, may_end_N, 1 / temperature_N, vocabulary, drawable_NU)

    def teacher_total(self) -> Array:
        """log of the teacher's tempered weight with an estimate of what was not listed: all of it at the cap."""
        weights = self._weights(self.teacher)
        unseen_N = np.where(self.heat_N >= 1, weights.most_N, weights.least_N)
        return np.log(weights.total_N + unseen_N) + weights.peak_N

    def certify(
        self,
        rule: AlphaRule,
        alpha_N: Array,
        solved_N: Array,
        mixed: tuple[Array, Array],
        support: tuple[Array, Array] | None,
        top_p_N: Array,
    ) -> Certificate:
        """The bounds of docs/theory.md sections 10.3 to 10.5.

        Args:
            alpha_N: as the rule chose it. solved_N: rows where it did; the others take the teacher as it is.
            mixed: log weights of base and teacher that were mixed, masked and merged, before any support.
            support: columns of the nucleus and which are valid, None without the constraint.
            top_p_N: the mass it was to reach.
        """
        base, teacher = self._weights(self.base), self._weights(self.teacher)
        base_NU, teacher_NU = (
            np.maximum(log_NU - w.peak_N[:, None], LOG_ZERO) for log_NU, w in zip(mixed, (base, teacher), strict=True)
        )
        if support is None:
            sure_N = np.ones(len(alpha_N), dtype=bool)
            boxes = Boxes(
                base.low_NU, base.high_NU, teacher.low_NU, teacher.high_NU,
                base.low_NU > LOG_ZERO, teacher.low_NU > LOG_ZERO,
                base.most_N, teacher.most_N,
                np.log(base.total_N + base.least_N), np.log(base.total_N + base.most_N),
                np.log(teacher.total_N + teacher.least_N), np.log(teacher.total_N + teacher.most_N),
            )  # fmt: skip
        else:
            columns_NK, valid_NK = support
            sure_N = self._support_is_sure(teacher, columns_NK, valid_NK, top_p_N)

            def held(log_NU: Array) -> Array:
                return np.where(valid_NK, take_columns(log_NU, columns_NK), LOG_ZERO)

            base_NU, teacher_NU = held(base_NU), held(teacher_NU)
            ends = [held(x) for x in (base.low_NU, base.high_NU, teacher.low_NU, teacher.high_NU)]
            base_lo_N, base_hi_N = _totals(ends[0], ends[1], base.most_N)
            teacher_lo_N, teacher_hi_N = _totals(ends[2], ends[3], teacher.most_N)
            sure_N = sure_N & (base_lo_N > 0)
            base_lo_N = np.where(sure_N, base_lo_N, 1.0)
            nothing_N = np.zeros_like(alpha_N)
            totals = [_log(x_N) for x_N in (base_lo_N, base_hi_N, teacher_lo_N, teacher_hi_N)]
            boxes = Boxes(
                ends[0], ends[1], ends[2], ends[3], valid_NK, valid_NK, nothing_N, nothing_N,
                totals[0], totals[1], totals[2], totals[3],
            )  # fmt: skip
        exact_N = boxes.exact & sure_N
        alpha_bound_N, cost_N = np.zeros_like(alpha_N), np.zeros_like(alpha_N)
        open_N = np.flatnonzero(solved_N & sure_N & ~exact_N)
        if len(open_N):
            alpha_bound_N[open_N], cost_N[open_N] = rule.certify(boxes.rows(open_N), alpha_N[open_N])
        bound_N = np.minimum(boxes.at_alpha(alpha_N, base_NU, teacher_NU) + cost_N, 1.0)
        return Certificate(
            np.minimum(np.minimum(self._seen(self.base), self._seen(self.teacher)), 1.0),
            np.where(sure_N | ~solved_N, alpha_bound_N, 1.0),
            np.where(exact_N, 0.0, np.where(sure_N, bound_N, 1.0)),
        )

    def _support_is_sure(self, teacher: _Weights, columns_NK: Array, valid_NK: Array, top_p_N: Array) -> Array:
        """Rows whose nucleus is the same in every completion (docs/theory.md section 10.5)."""
        inside_NU = np.zeros(self.ids_NU.shape, dtype=bool)
        rows_N1 = np.arange(len(columns_NK))[:, None]
        np.logical_or.at(inside_NU, (rows_N1, columns_NK), valid_NK)
        low_NU, high_NU = np.exp(teacher.low_NU), np.exp(teacher.high_NU)
        smallest_N = np.min(np.where(inside_NU, low_NU, np.inf), axis=-1)
        largest_outside_N = np.max(np.where(inside_NU | (low_NU == high_NU), 0.0, high_NU), axis=-1)
        largest_outside_N = np.maximum(largest_outside_N, np.where(teacher.most_N > 0, teacher.cap_N, 0.0))
        inside_lo_N = np.where(inside_NU, low_NU, 0.0).sum(axis=-1)
        inside_hi_N = np.where(inside_NU, high_NU, 0.0).sum(axis=-1)
        total_lo_N, total_hi_N = teacher.total_N + teacher.least_N, teacher.total_N + teacher.most_N
        reaches_N = (inside_lo_N >= top_p_N * total_hi_N) | (teacher.most_N == 0)
        needed_N = inside_hi_N - smallest_N < top_p_N * total_lo_N
        return (smallest_N > largest_outside_N) & reaches_N & needed_N

    def _seen(self, side: Side) -> Array:
        return np.where(side.mass_N > 0, 1.0 - side.mass_N, 1.0)

    def _weights(self, side: Side) -> _Weights:
        """The boxes of one model's tempered, masked, merged weights, scaled to a peak of 1 (docs/theory.md (22))."""
        heat_N1 = self.heat_N[:, None]
        known_NU = side.known_NU & self.drawable_NU
        peak_N = np.max(np.where(known_NU, side.values_NU, -np.inf), axis=-1)
        peak_N = np.where(np.isfinite(peak_N), peak_N, 0.0)
        scale_N = np.exp(-peak_N)

        hidden_N = self.outcomes.hidden_count(self.may_end_N, self.vocabulary) + side.sizes_N - self.vocabulary
        hidden_N = np.maximum(hidden_N - (side.known_NU & ~self.drawable_NU).sum(axis=-1), 0)
        unlisted_N = np.maximum(side.sizes_N - side.known_NU.sum(axis=-1), 0)
        mass_N, cap_N = side.mass_N * scale_N, side.cap_N * scale_N
        least_N, most_N = unseen(mass_N, cap_N, np.maximum(unlisted_N - hidden_N, 0), hidden_N, self.heat_N)
        cap_N = cap_N**self.heat_N

        low_NU = np.where(known_NU, np.maximum((side.values_NU - peak_N[:, None]) * heat_N1, LOG_ZERO), LOG_ZERO)
        one_N = np.maximum(np.minimum(cap_N, most_N), 1e-300)
        missing_NU = self.drawable_NU & ~side.known_NU
        high_NU = np.where(missing_NU, np.log(one_N)[:, None], low_NU)
        if self.outcomes.stop_outcome is not None:
            stops_NU = self.outcomes.stop_columns(self.ids_NU)
            lead_NU = (self.ids_NU == self.outcomes.stop_outcome) & self.drawable_NU
            low_N = np.where(stops_NU, np.exp(low_NU), 0.0).sum(axis=-1)
            high_N = low_N + np.minimum((missing_NU & stops_NU).sum(axis=-1) * cap_N, most_N)
            low_NU, high_NU = (
                np.where(stops_NU, np.where(lead_NU, _log(x_N)[:, None], LOG_ZERO), x_NU)
                for x_N, x_NU in ((low_N, low_NU), (high_N, high_NU))
            )
        total_N = np.exp(low_NU).sum(axis=-1)
        return _Weights(low_NU, high_NU, total_N, least_N, most_N, cap_N, peak_N * self.heat_N)


@dataclass(frozen=True, slots=True)
class _Weights:
    """Boxes of one model: log ends, sum of what is known, ends of the unseen total, cap of one id, log of the scale."""

    low_NU: Array
    high_NU: Array
    total_N: Array
    least_N: Array
    most_N: Array
    cap_N: Array
    peak_N: Array


def _side(
    lists: Sequence[Listed],
    unions: list[list[int]],
    width: int,
    drawable_NU: Array,
    stops_NU: Array,
    lead_NU: Array,
) -> Side:
    nan = float("nan")
    values_NU = np.array(
        [
            [row.logprobs.get(i, nan) for i in union] + [nan] * (width - len(union))
            for row, union in zip(lists, unions, strict=True)
        ]
    )
    known_NU = ~np.isnan(values_NU)
    sizes_N = np.array([row.size for row in lists])
    seen_N = np.where(known_NU, np.exp(values_NU, where=known_NU, out=np.zeros_like(values_NU)), 0.0).sum(axis=-1)
    whole_N = known_NU.sum(axis=-1) >= sizes_N
    mass_N = np.where(whole_N, 0.0, np.maximum(1.0 - seen_N, 0.0) + MASS_PRECISION)
    cap_N = np.minimum(np.exp([row.floor for row in lists]), mass_N)

    # Of a stop class that is partly listed the rest is left out; of one that is not, one member stands for it.
    class_listed_N1 = (known_NU & stops_NU).any(axis=-1)[:, None]
    missing_NU = drawable_NU & ~known_NU & (~stops_NU | (lead_NU & ~class_listed_N1))
    count_N = np.maximum(missing_NU.sum(axis=-1), 1)
    estimate_N = _log(np.minimum(cap_N, mass_N / count_N))
    values_NU = np.where(known_NU, values_NU, np.where(missing_NU, estimate_N[:, None], -np.inf))
    return Side(values_NU, known_NU, mass_N, cap_N, sizes_N)


def _totals(low_NK: Array, high_NK: Array, most_N: Array) -> tuple[Array, Array]:
    """Ends of the weight of a support (docs/theory.md (32))."""
    low_N, high_N = np.exp(low_NK).sum(axis=-1), np.exp(high_NK).sum(axis=-1)
    return low_N, low_N + np.minimum(high_N - low_N, most_N)


def _log(x_N: Array) -> Array:
    return np.log(np.maximum(x_N, 1e-300))


def unlisted_ids(base: Listed, teacher: Listed, settings: RowSettings, vocabulary: int) -> tuple[list[int], list[int]]:
    """Ids whose log-probability would make the row's union complete: (of the base, of the teacher).

    With a support constraint only the teacher's nucleus counts, and of the teacher only the stop class in it.
    """
    outcomes = settings.outcomes
    hidden = outcomes.hidden if settings.may_end else outcomes.hidden_before_end
    stops = outcomes.stop_ids if outcomes.merged and settings.may_end else ()
    if settings.top_p is None:
        wanted = base.logprobs.keys() | teacher.logprobs.keys()
    else:
        wanted = _nucleus_ids(teacher, settings, hidden, vocabulary)
    wanted = {i for i in wanted if i < vocabulary and i not in hidden}
    if not wanted.isdisjoint(stops):
        wanted.update(stops)
    return sorted(wanted - base.logprobs.keys()), sorted(wanted - teacher.logprobs.keys())


def _nucleus_ids(teacher: Listed, settings: RowSettings, hidden: frozenset[int], vocabulary: int) -> set[int]:
    """At least the ids of the nucleus that lie in the teacher's list."""
    heat = 1 / (settings.temperature or 1.0)
    allowed = [(lp, i) for i, lp in teacher.logprobs.items() if i < vocabulary and i not in hidden]
    allowed.sort(key=lambda entry: (-entry[0], entry[1]))
    rest = max(1 - math.fsum(map(math.exp, teacher.logprobs.values())), 0.0) + MASS_PRECISION
    weights = [math.exp(lp * heat) for lp, _ in allowed]
    needed = (settings.top_p or 1.0) * (math.fsum(weights) + rest * math.exp(teacher.floor * (heat - 1)))
    found: set[int] = set()
    reached = 0.0
    for weight, (_, i) in zip(weights, allowed, strict=True):
        found.add(i)
        reached += weight
        if reached >= needed:
            break
    return found

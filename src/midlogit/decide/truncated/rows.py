"""Rows of which a server lists only some ids: their common columns, the estimate of what is missing, what to ask.

Knows lists of log-probabilities and the outcomes drawn from (docs/theory.md section 10); no server.
Arrays are NumPy: N rows, U ids of either list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

from midlogit.core.arrays import Array, log_sum_exp
from midlogit.core.bounds import MASS_PRECISION
from midlogit.core.outcomes import Outcomes

if TYPE_CHECKING:
    from midlogit.decide.base import Draft, RowSettings


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """What one model said of one position.

    Attributes:
        logprobs: log-probability by id, listed or scored.
        max_unlisted: no id that is not in `logprobs` has a higher log-probability.
        size: ids that the model has.
    """

    logprobs: dict[int, float]
    max_unlisted: float
    size: int


@dataclass(frozen=True, slots=True)
class Side:
    """One model's part of N truncated rows.

    Attributes:
        values_NU: log-probabilities; where not known, the estimate (docs/theory.md (34)) or −inf.
        known_NU: reported values. missing_NU: outcomes that the model has and did not report.
        mass_N: probability that was not reported. cap_N: the largest that an unreported id may have.
        sizes_N: ids of the model.
    """

    values_NU: Array
    known_NU: Array
    missing_NU: Array
    mass_N: Array
    cap_N: Array
    sizes_N: Array

    def raw_logprobs(self, members_NU: Array) -> tuple[Array, Array]:
        """Log-probability of one outcome of each row, and whether it is only an upper bound (docs/theory.md (21)).

        Args:
            members_NU: the columns of the ids that the outcome stands for.
        """
        reported_N = log_sum_exp(np.where(members_NU & self.known_NU, self.values_NU, -np.inf))
        count_N = (members_NU & self.missing_NU).sum(axis=-1)
        unseen_N = np.minimum(count_N * self.cap_N, self.mass_N)
        bound_N = np.logaddexp(reported_N, _log(unseen_N))
        return np.where(count_N > 0, bound_N, reported_N), count_N > 0


@dataclass(frozen=True, slots=True)
class TruncatedRows:
    """N rows of two truncated lists on common columns; build with `TruncatedRows.of`."""

    base: Side
    teacher: Side
    ids_NU: Array
    outcomes: Outcomes
    may_end_N: Array
    inv_temperature_N: Array
    vocabulary: int
    drawable_NU: Array

    @classmethod
    def of(
        cls,
        pairs: Sequence[tuple[TopLogprobs, TopLogprobs]],
        outcomes: Outcomes,
        may_end_N: Array,
        temperature_N: Array,
        vocabulary: int,
    ) -> TruncatedRows:
        """The union of both lists of each row, in id order.

        The stop class brings all its members along as soon as one is listed.

        Args:
            pairs: base and teacher lists of each row.
            vocabulary: ids below it are drawn from; of the rest, which only one model has, a stop id counts for its
                class.
        """
        stops = outcomes.merged_stops
        unions = []
        for base, teacher in pairs:
            union = base.logprobs.keys() | teacher.logprobs.keys()
            unions.append(sorted(union | stops if not stops.isdisjoint(union) else union))
        width = max(map(len, unions))
        ids_NU = np.array([union + [-1] * (width - len(union)) for union in unions])
        ids_NU = np.where((ids_NU < vocabulary) | outcomes.stop_columns(ids_NU), ids_NU, -1)
        drawable_NU = outcomes.drawable(ids_NU, may_end_N)
        sides = _sides(pairs, unions, width, drawable_NU, outcomes, ids_NU)
        return cls(sides[0], sides[1], ids_NU, outcomes, may_end_N, 1 / temperature_N, vocabulary, drawable_NU)


@dataclass(frozen=True, slots=True)
class ServedDrafts:
    """What a server drafted for some of N truncated rows.

    Attributes:
        served_N: the rows that have such a draft. columns_N: where it is.
        law_NU: D, what it was drafted from. weight_N: D of it, 0 where it is in no column and so cannot stand.
    """

    served_N: Array
    columns_N: Array
    weight_N: Array
    law_NU: Array

    @classmethod
    def of(cls, seen: TruncatedRows, drafts: Sequence[Draft | None]) -> ServedDrafts | None:
        """On the columns of the rows, the stop class summed as the outcomes are; None when no row has a draft."""
        if not any(drafts):
            return None
        ids_NU, outcomes = seen.ids_NU, seen.outcomes
        nothing = [0.0] * ids_NU.shape[1]
        law_NU = np.array(
            [
                nothing if draft is None else [draft.law.get(i, 0.0) for i in ids]
                for draft, ids in zip(drafts, ids_NU.tolist(), strict=True)
            ]
        )
        if outcomes.stop_outcome is not None:
            stops_NU = outcomes.stop_columns(ids_NU)
            mass_N1 = np.where(stops_NU, law_NU, 0.0).sum(axis=-1)[:, None]
            law_NU = np.where(stops_NU, np.where(ids_NU == outcomes.stop_outcome, mass_N1, 0.0), law_NU)
        wanted = [-2 if draft is None else outcomes.outcome_of(draft.token_id) for draft in drafts]
        found_NU = ids_NU == np.array(wanted)[:, None]
        return cls(
            served_N=np.array([draft is not None for draft in drafts]),
            columns_N=found_NU.argmax(axis=-1),
            weight_N=np.where(found_NU, law_NU, 0.0).sum(axis=-1),
            law_NU=law_NU,
        )


def _sides(
    pairs: Sequence[tuple[TopLogprobs, TopLogprobs]],
    unions: list[list[int]],
    width: int,
    drawable_NU: Array,
    outcomes: Outcomes,
    ids_NU: Array,
) -> list[Side]:
    """Of base and teacher, whose rows are handled as one array of 2 N."""
    lists = [row for rows in zip(*pairs, strict=True) for row in rows]
    drawable_NU, ids_NU = (np.concatenate([x_NU, x_NU]) for x_NU in (drawable_NU, ids_NU))
    values_NU = np.array(
        [
            [*map(row.logprobs.get, union, repeat(math.nan)), *repeat(math.nan, width - len(union))]
            for row, union in zip(lists, [*unions, *unions], strict=True)
        ]
    )
    known_NU = ~np.isnan(values_NU)
    sizes_N = np.array([row.size for row in lists])
    seen_N = np.exp(np.where(known_NU, values_NU, -np.inf)).sum(axis=-1)
    floor_N = np.exp([row.max_unlisted for row in lists])
    whole_N = (known_NU.sum(axis=-1) >= sizes_N) | (floor_N == 0)  # of what is not listed nothing has mass
    mass_N = np.where(whole_N, 0.0, np.maximum(1.0 - seen_N, 0.0) + MASS_PRECISION)
    cap_N = np.minimum(floor_N, mass_N)

    missing_NU = drawable_NU & ~known_NU & (ids_NU < sizes_N[:, None])
    # Of a stop class that is partly listed the rest is left out; of one that is not, one member stands for it.
    estimated_NU = missing_NU
    if outcomes.stop_outcome is not None:
        stops_NU = outcomes.stop_columns(ids_NU)
        class_listed_N1 = (known_NU & stops_NU).any(axis=-1)[:, None]
        estimated_NU = missing_NU & (~stops_NU | ((ids_NU == outcomes.stop_outcome) & ~class_listed_N1))
    count_N = np.maximum(estimated_NU.sum(axis=-1), 1)
    estimate_N = _log(np.minimum(cap_N, mass_N / count_N))
    values_NU = np.where(known_NU, values_NU, np.where(estimated_NU, estimate_N[:, None], -np.inf))
    count = len(pairs)
    return [
        Side(values_NU[part], known_NU[part], missing_NU[part], mass_N[part], cap_N[part], sizes_N[part])
        for part in (slice(count), slice(count, None))
    ]


def _log(x_N: Array) -> Array:
    return np.log(np.maximum(x_N, 1e-300))


def unlisted_ids(
    base: TopLogprobs, teacher: TopLogprobs, settings: RowSettings, vocabulary: int
) -> tuple[list[int], list[int]]:
    """Ids whose log-probability would make the row's union complete: (of the base, of the teacher).

    With a support constraint only ids that may lie in the teacher's nucleus count.
    """
    outcomes = settings.outcomes
    hidden = outcomes.hidden if settings.may_end else outcomes.hidden_before_end
    stops = outcomes.merged_stops if settings.may_end else frozenset()
    drawable = {
        i for i in base.logprobs.keys() | teacher.logprobs.keys() if (i < vocabulary or i in stops) and i not in hidden
    }
    wanted = drawable if settings.top_p is None else _nucleus_ids(teacher, drawable, settings)
    if not wanted.isdisjoint(stops):
        wanted = wanted | stops
    return tuple(  # type: ignore[return-value]
        sorted(i for i in wanted if i < row.size and i not in row.logprobs) for row in (base, teacher)
    )


def _nucleus_ids(teacher: TopLogprobs, drawable: set[int], settings: RowSettings) -> set[int]:
    """At least the ids of the nucleus among those that may be drawn; all, where the teacher's list ends before it."""
    inv_temperature = 1 / (settings.temperature or 1.0)
    allowed = [(lp, i) for i, lp in teacher.logprobs.items() if i in drawable]
    allowed.sort(key=lambda entry: (-entry[0], entry[1]))
    rest = max(1 - math.fsum(map(math.exp, teacher.logprobs.values())), 0.0) + MASS_PRECISION
    weights = [math.exp(lp * inv_temperature) for lp, _ in allowed]
    needed = (settings.top_p or 1.0) * (
        math.fsum(weights) + rest * math.exp(teacher.max_unlisted * (inv_temperature - 1))
    )
    found: set[int] = set()
    reached = 0.0
    for weight, (_, i) in zip(weights, allowed, strict=True):
        found.add(i)
        reached += weight
        if reached >= needed and settings.top_p != 1:
            return found
    return drawable

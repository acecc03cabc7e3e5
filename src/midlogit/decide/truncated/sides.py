"""One model's part of N truncated rows on their common columns; knows lists of log-probabilities, no mixture.

Arrays are NumPy: N rows, U columns for the ids of either list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat

import numpy as np

from midlogit.core.arrays import Array, log_sum_exp
from midlogit.core.bounds import MASS_PRECISION, log_or_tiny, unlisted_weight
from midlogit.core.outcomes import Outcomes
from midlogit.decide.truncated.lists import TopLogprobs

ListPair = tuple[TopLogprobs, TopLogprobs]  # of base and teacher


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of N truncated rows: the union of both lists of each row, in id order.

    Attributes:
        union_NU: the id of each column, −1 for none. ids_NU: the same, and −1 for ids that no token can come from.
        drawable_NU: ids that may be drawn, the members of the stop class among them.
        stops_NU: members of the merged stop class. lead_NU: the member whose column counts for all of them.
    """

    union_NU: Array
    ids_NU: Array
    drawable_NU: Array
    stops_NU: Array
    lead_NU: Array

    @classmethod
    def of(
        cls, pairs: Sequence[ListPair], outcomes: Outcomes, may_end_N: Array, vocabulary: int
    ) -> Columns:
        """The stop class brings all its members as soon as one is listed.

        Args:
            vocabulary: ids below it are drawn from; of the rest, which only one model has, a stop id counts for its
                class.
        """
        stops = outcomes.merged_stops
        unions = []
        for base, teacher in pairs:
            union = base.logprobs.keys() | teacher.logprobs.keys()
            unions.append(sorted(union | stops if not stops.isdisjoint(union) else union))
        width = max(map(len, unions))

        union_NU = np.array([union + [-1] * (width - len(union)) for union in unions])
        stops_NU = _are_in(union_NU, stops)
        ids_NU = np.where((union_NU < vocabulary) | stops_NU, union_NU, -1)
        may_end_NU = may_end_N[:, None] | ~_are_in(ids_NU, outcomes.ending)
        drawable_NU = (ids_NU >= 0) & may_end_NU & ~_are_in(ids_NU, outcomes.masked)
        lead_NU = stops_NU if outcomes.stop_outcome is None else ids_NU == outcomes.stop_outcome
        return cls(union_NU, ids_NU, drawable_NU, stops_NU, lead_NU)

    def merge_stops(self, values_NU: Array, total_N: Array, nothing: float) -> Array:
        """Values with those of the stop class replaced: the total in its column, `nothing` in its other members'."""
        class_NU = np.where(self.lead_NU, total_N[:, None], nothing)
        return np.where(self.stops_NU, class_NU, values_NU)


def _are_in(ids_NU: Array, members: frozenset[int]) -> Array:
    lookup = _lookup(members)
    return lookup[np.minimum(ids_NU, len(lookup) - 1)]


@lru_cache(maxsize=256)
def _lookup(members: frozenset[int]) -> Array:
    """Whether each id is a member; the last entry is False, and −1 and ids beyond the members point there."""
    lookup = np.zeros(2 + max(members, default=0), dtype=bool)
    lookup[list(members)] = True
    return lookup


@dataclass(frozen=True, slots=True)
class Side:
    """One model's part of N truncated rows.

    Attributes:
        values_NU: log-probabilities; where not known, the estimate (docs/theory.md (34)) or −inf.
        known_NU: reported values. missing_NU: outcomes that the model has and did not report.
        mass_N: probability that was not reported. cap_N: the largest that an unreported id may have.
        sizes_N: number of ids of the model.
    """

    values_NU: Array
    known_NU: Array
    missing_NU: Array
    mass_N: Array
    cap_N: Array
    sizes_N: Array

    @property
    def reported_NU(self) -> Array:
        """Log-probabilities as they were reported, −inf elsewhere."""
        return np.where(self.known_NU, self.values_NU, -np.inf)

    def raw_logprobs(self, members_NU: Array) -> tuple[Array, Array]:
        """Log-probability of one outcome per row, and whether it is only an upper bound (docs/theory.md (21)).

        Args:
            members_NU: the columns of the ids that belong to the outcome.
        """
        reported_N = log_sum_exp(np.where(members_NU & self.known_NU, self.values_NU, -np.inf))
        count_N = (members_NU & self.missing_NU).sum(axis=-1)
        unlisted_N = np.minimum(count_N * self.cap_N, self.mass_N)
        bound_N = np.logaddexp(reported_N, log_or_tiny(unlisted_N))
        return np.where(count_N > 0, bound_N, reported_N), count_N > 0

    def tempered(
        self, ids_N: Array, own_NU: Array, inv_temperature_N: Array
    ) -> tuple[Array, Array, Array]:
        """One id per row under the whole tempered model, as far as its list shows (docs/theory.md (34a)).

        Args:
            ids_N: the id. own_NU: its column.

        Returns:
            Its log-probability; log of the mass of all ids, on the scale of tempered log-probabilities; a bound on the
            error of the former, ∞ for an id of which only an estimate is known.
        """
        log_NU = np.where(self.known_NU, self.values_NU, -np.inf) * inv_temperature_N[:, None]
        listed_N = log_sum_exp(log_NU)
        unlisted_N = np.maximum(self.sizes_N - self.known_NU.sum(axis=-1), 0)
        least_N, most_N = unlisted_weight(
            self.mass_N, self.cap_N, unlisted_N, np.zeros_like(unlisted_N), inv_temperature_N
        )
        low_N, high_N = (np.logaddexp(listed_N, log_or_tiny(x_N)) for x_N in (least_N, most_N))
        whole_N = inv_temperature_N == 1
        mass_N = np.where(whole_N, 0.0, 0.5 * (low_N + high_N))
        bound_N = np.where(whole_N, 0.0, 0.5 * (high_N - low_N))

        value_N = np.where(own_NU, self.values_NU, -np.inf).max(axis=-1) * inv_temperature_N
        seen_N = (own_NU & self.known_NU).any(axis=-1)
        guessed_N = ~seen_N & (ids_N < self.sizes_N) & (self.mass_N > 0)
        return value_N - mass_N, mass_N, np.where(guessed_N, np.inf, bound_N)


def make_sides(pairs: Sequence[ListPair], columns: Columns) -> tuple[Side, Side]:
    """Base and teacher on the columns; both are handled as one array of 2 N rows."""
    lists = [base for base, _ in pairs] + [teacher for _, teacher in pairs]
    unions = columns.union_NU.tolist() * 2
    values_NU = np.array(
        [
            [*map(row.logprobs.get, ids, repeat(math.nan))]
            for row, ids in zip(lists, unions, strict=True)
        ]
    )
    known_NU = ~np.isnan(values_NU)
    ids_NU, drawable_NU, stops_NU, lead_NU = (
        np.concatenate([x_NU, x_NU])
        for x_NU in (columns.ids_NU, columns.drawable_NU, columns.stops_NU, columns.lead_NU)
    )

    # What is not listed: 0 if the list is complete, or if nothing outside it has mass.
    sizes_N = np.array([row.size for row in lists])
    listed_N = np.exp(np.where(known_NU, values_NU, -np.inf)).sum(axis=-1)
    max_unlisted_N = np.exp([row.max_unlisted for row in lists])
    whole_N = (known_NU.sum(axis=-1) >= sizes_N) | (max_unlisted_N == 0)
    mass_N = np.where(whole_N, 0.0, np.maximum(1.0 - listed_N, 0.0) + MASS_PRECISION)
    cap_N = np.minimum(max_unlisted_N, mass_N)

    # The estimate. A stop class that is partly listed gets none for the rest; one that is not gets one for all.
    missing_NU = drawable_NU & ~known_NU & (ids_NU < sizes_N[:, None])
    class_listed_N1 = (known_NU & stops_NU).any(axis=-1)[:, None]
    estimated_NU = missing_NU & (~stops_NU | (lead_NU & ~class_listed_N1))
    count_N = np.maximum(estimated_NU.sum(axis=-1), 1)
    estimate_N = log_or_tiny(np.minimum(cap_N, mass_N / count_N))
    values_NU = np.where(known_NU, values_NU, np.where(estimated_NU, estimate_N[:, None], -np.inf))

    both = (values_NU, known_NU, missing_NU, mass_N, cap_N, sizes_N)
    count = len(pairs)
    return Side(*(x[:count] for x in both)), Side(*(x[count:] for x in both))

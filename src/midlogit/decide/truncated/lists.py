"""One position as a server lists it, and which ids to ask it to score; knows lists of log-probabilities, no server.

docs/theory.md section 10.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache

from midlogit.core.bounds import MASS_PRECISION
from midlogit.core.outcomes import Outcomes
from midlogit.decide.base import RowSettings


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The log-probabilities that one model reports at one position.

    Attributes:
        logprobs: log-probability by id, listed or scored.
        max_unlisted: no id that is not in `logprobs` has a higher log-probability.
        size: number of ids that the model has.
    """

    logprobs: dict[int, float]
    max_unlisted: float
    size: int

    def unlisted_mass(self) -> float:
        """Probability of all unlisted ids, at most; 0 if every id with mass is listed."""
        if len(self.logprobs) >= self.size or not math.exp(self.max_unlisted):
            return 0.0
        return max(1.0 - sum(map(math.exp, self.logprobs.values())), 0.0) + MASS_PRECISION


def drawable_ids(ids: Set[int], settings: RowSettings, vocabulary: int) -> set[int]:
    """Those of the ids that may be drawn, members of the merged stop class that one model lacks among them."""
    outcomes = settings.outcomes
    masked = outcomes.masked if settings.may_end else outcomes.masked_before_end
    stops = outcomes.merged_stops
    return {i for i in ids if (i < vocabulary or i in stops) and i not in masked}


def stops_beyond(outcomes: Outcomes, vocabulary: int) -> list[int]:
    """The members of the merged stop class that only the model with more ids than `vocabulary` has."""
    return [i for i in outcomes.merged_stops if i >= vocabulary]


def num_masked(outcomes: Outcomes, may_end: bool, vocabulary: int) -> int:
    """Number of ids below `vocabulary` that may not be drawn."""
    return _num_below(outcomes.masked if may_end else outcomes.masked_before_end, vocabulary)


@lru_cache(maxsize=256)
def _num_below(ids: frozenset[int], vocabulary: int) -> int:
    return sum(i < vocabulary for i in ids)


def unlisted_ids(
    base: TopLogprobs, teacher: TopLogprobs, settings: RowSettings, vocabulary: int
) -> tuple[list[int], list[int]]:
    """Ids to score so that both models report every id of the union: (by the base, by the teacher).

    With a support constraint only ids that may lie in the teacher's nucleus count.
    """
    drawable = drawable_ids(base.logprobs.keys() | teacher.logprobs.keys(), settings, vocabulary)
    wanted = drawable if settings.top_p is None else _nucleus_ids(teacher, drawable, settings)
    stops = settings.outcomes.merged_stops if settings.may_end else frozenset()
    if not wanted.isdisjoint(stops):
        wanted = wanted | stops
    return _unlisted(base, wanted), _unlisted(teacher, wanted)


def _unlisted(row: TopLogprobs, ids: Set[int]) -> list[int]:
    return sorted(i for i in ids if i < row.size and i not in row.logprobs)


def _nucleus_ids(teacher: TopLogprobs, drawable: set[int], settings: RowSettings) -> set[int]:
    """A superset of the nucleus among ids that may be drawn; all of them if the teacher's list ends before it.

    `single.py` and `core.nucleus` find the nucleus itself; here stop ids are not merged, and rounding errs to more.
    """
    inv_temperature = 1 / (settings.temperature or 1.0)
    allowed = [(logprob, i) for i, logprob in teacher.logprobs.items() if i in drawable]
    allowed.sort(key=lambda entry: (-entry[0], entry[1]))

    rest = max(1 - math.fsum(map(math.exp, teacher.logprobs.values())), 0.0) + MASS_PRECISION
    weights = [math.exp(logprob * inv_temperature) for logprob, _ in allowed]
    unlisted = rest * math.exp(teacher.max_unlisted * (inv_temperature - 1))
    needed = (settings.top_p or 1.0) * (math.fsum(weights) + unlisted)

    found: set[int] = set()
    reached = 0.0
    for weight, (_, i) in zip(weights, allowed, strict=True):
        found.add(i)
        reached += weight
        if reached >= needed and settings.top_p != 1:
            return found
    return drawable

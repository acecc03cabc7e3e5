"""What both sides list of the same positions, and how the gaps between their lists are filled.

Knows models, seats and what a draw wants to know; draws nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from midlogit.decide.base import RowSettings
from midlogit.decide.truncated.lists import TopLogprobs, unlisted_ids
from midlogit.engines.http.rows import most_likely
from midlogit.engines.http.side import Row, Seat, Side

Pair = tuple[TopLogprobs, TopLogprobs]  # of base and teacher
Seats = tuple[Seat, Seat]
Ids = tuple[list[int], list[int]]


@dataclass(frozen=True, slots=True)
class Model:
    """One side as the engine sees it: where rows come from, how many ids it has, whether it scores chosen ids."""

    side: Side
    logit_size: int
    scores: bool

    def listed(self, row: dict[int, float]) -> TopLogprobs:
        return TopLogprobs(row, min(row.values()), self.logit_size)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Lists of base and teacher; of all ids, those below `vocabulary` are drawn."""

    base: Model
    teacher: Model
    vocabulary: int

    def top(self, seats: Seats, k: int) -> tuple[Row, ...]:
        """The `k` most likely ids of both behind their prefixes."""
        return (*self.base.side.top(seats[0], k), *self.teacher.side.top(seats[1], k))

    async def listed(self, rows: tuple[Row, ...]) -> Pair:
        """The answers of `top`."""
        return self.base.listed(await rows[0]), self.teacher.listed(await rows[1])

    def unknown(self, pair: Pair, settings: RowSettings) -> Ids:
        """What only one of them lists and the other can score: (of the base, of the teacher)."""
        base, teacher = unlisted_ids(*pair, settings, self.vocabulary)
        return base if self.base.scores else [], teacher if self.teacher.scores else []

    def cut(self, wide: tuple[dict[int, float], dict[int, float]], k: int, settings: RowSettings) -> tuple[Pair, Ids]:
        """The pair that lists of `k` make with all that the longer lists know of it, and what they do not know."""
        pair = self.base.listed(most_likely(wide[0], k)), self.teacher.listed(most_likely(wide[1], k))
        unknown = self.unknown(pair, settings)
        base, teacher = (
            replace(one, logprobs=one.logprobs | {i: row[i] for i in ids if i in row})
            for one, row, ids in zip(pair, wide, unknown, strict=True)
        )
        rest = [[i for i in ids if i not in row] for row, ids in zip(wide, unknown, strict=True)]
        return (base, teacher), (rest[0], rest[1])

    async def scored(
        self, seats: Seats, pairs: Sequence[Pair], unknown: Sequence[Ids], drafted: Sequence[int] = ()
    ) -> list[Pair]:
        """The pairs with scores of what was unknown; they lie behind the prefixes as in `Side.top`."""
        # Both sides are asked before either is waited for.
        asked = [
            model.side.score(seat, ids, drafted)
            for model, seat, ids in zip((self.base, self.teacher), seats, zip(*unknown, strict=True), strict=True)
        ]
        return [
            (await _joined(pair[0], base), await _joined(pair[1], teacher))
            for pair, base, teacher in zip(pairs, *asked, strict=True)
        ]


async def _joined(one: TopLogprobs, scores: list[asyncio.Future[dict[int, float]]]) -> TopLogprobs:
    for part in scores:
        one = replace(one, logprobs=one.logprobs | await part)
    return one

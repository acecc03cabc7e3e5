"""The top logprobs of both sides at the same positions, and the scores that fill the gaps between their lists.

Knows sides, slots and the settings of a row; samples nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from midlogit.decide.base import RowSettings
from midlogit.decide.truncated.lists import TopLogprobs, unlisted_ids
from midlogit.engines.http.replicas import PendingRow, ReplicaPool, Slot
from midlogit.engines.http.rounds import ListWidth
from midlogit.engines.http.rows import most_likely
from midlogit.engines.http.upstream import SIDES
from midlogit.engines.http.verification import VerifyRequest
from midlogit.outputs import Side

# Of (base, teacher), each:
TopPair = tuple[TopLogprobs, TopLogprobs]
SlotPair = tuple[Slot, Slot]
IdsPair = tuple[list[int], list[int]]


@dataclass(frozen=True, slots=True)
class ServedSide:
    """One side as the engine sees it.

    Attributes:
        replicas: where its rows come from. logit_size: ids that its model has.
        scores: whether its servers score chosen ids. verifies: whether they verify drafts as one sequence.
    """

    replicas: ReplicaPool
    logit_size: int
    scores: bool
    verifies: bool

    def top_logprobs(self, row: dict[int, float]) -> TopLogprobs:
        """A list as it was returned: no id outside it is more likely than its least likely one."""
        return TopLogprobs(row, min(row.values()), self.logit_size)


@dataclass(frozen=True, slots=True)
class PairedSides:
    """Base and teacher; ids below `vocabulary` may be sampled."""

    base: ServedSide
    teacher: ServedSide
    vocabulary: int

    @property
    def scores(self) -> bool:
        """Whether the servers of both sides score chosen ids."""
        return self.base.scores and self.teacher.scores

    def with_other_weights(self, slots: SlotPair) -> list[Side]:
        """The sides of which a sequence has rows from other weights than they should have."""
        return [side for side, slot in zip(SIDES, slots, strict=True) if slot.has_other_weights]

    def request_top(self, slots: SlotPair, k: int) -> tuple[PendingRow, ...]:
        """The `k` most likely ids of both after their prefixes."""
        return (*self.base.replicas.top(slots[0], k), *self.teacher.replicas.top(slots[1], k))

    async def read_top(self, rows: tuple[PendingRow, ...]) -> TopPair:
        """The answers of `request_top`."""
        return self.base.top_logprobs(await rows[0]), self.teacher.top_logprobs(await rows[1])

    async def verify(
        self,
        slot: Slot,
        drafted: Sequence[int],
        base_rows: Sequence[dict[int, float]],
        width: ListWidth,
    ) -> list[dict[int, float]]:
        """The teacher's rows after the prefix and after each draft, where the base's are `base_rows`.

        As one sequence, which scores what the base lists; else each row as a prompt of its own, whose list is so long
        that little is left to score.
        """
        request = VerifyRequest(
            drafted,
            [
                [i for i in most_likely(row, width.start) if i < self.vocabulary]
                for row in base_rows
            ],
        )
        if self.teacher.verifies and slot.has_room_for(request.num_tokens):
            rows = await self.teacher.replicas.verify(slot, width.start, request)
            if rows is not None:
                return rows
        return [await row for row in self.teacher.replicas.top(slot, width.drafting, drafted)]

    def missing_ids(self, pair: TopPair, settings: RowSettings) -> IdsPair:
        """Ids that only the other side lists and that this side can score."""
        base, teacher = unlisted_ids(*pair, settings, self.vocabulary)
        return base if self.base.scores else [], teacher if self.teacher.scores else []

    def narrow(
        self, wide: tuple[dict[int, float], dict[int, float]], k: int, settings: RowSettings
    ) -> tuple[TopPair, IdsPair]:
        """The pair of the `k` most likely ids of each, and the ids that it still misses.

        Missing ids that the longer lists name are filled in from them, so they need not be scored.
        """
        pair = (
            self.base.top_logprobs(most_likely(wide[0], k)),
            self.teacher.top_logprobs(most_likely(wide[1], k)),
        )
        missing = self.missing_ids(pair, settings)

        base, teacher = (
            replace(side, logprobs=side.logprobs | {i: row[i] for i in ids if i in row})
            for side, row, ids in zip(pair, wide, missing, strict=True)
        )
        rest = [[i for i in ids if i not in row] for row, ids in zip(wide, missing, strict=True)]
        return (base, teacher), (rest[0], rest[1])

    async def with_scores(
        self,
        slots: SlotPair,
        pairs: Sequence[TopPair],
        missing: Sequence[IdsPair],
        drafted: Sequence[int] = (),
    ) -> list[TopPair]:
        """The pairs with the scores of their missing ids, at the prefixes of `ReplicaPool.top`."""
        # Both sides are called before either is waited for.
        base_ids, teacher_ids = [ids[0] for ids in missing], [ids[1] for ids in missing]
        base_scores = self.base.replicas.score(slots[0], base_ids, drafted)
        teacher_scores = self.teacher.replicas.score(slots[1], teacher_ids, drafted)

        return [
            (await _merged(pair[0], base), await _merged(pair[1], teacher))
            for pair, base, teacher in zip(pairs, base_scores, teacher_scores, strict=True)
        ]


async def _merged(listed: TopLogprobs, scores: list[PendingRow]) -> TopLogprobs:
    for part in scores:
        listed = replace(listed, logprobs=listed.logprobs | await part)
    return listed

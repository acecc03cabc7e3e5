"""The part of the HTTP engine that scores given text: the rows at its tokens, as if they had been drafted.

Knows texts and rows; nothing is drawn. A text is read with one version of the base's weights.
"""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from functools import partial
from typing import Any

from midlogit.decide.base import RowSettings
from midlogit.decide.truncated.rows import decide_truncated
from midlogit.engines.base import Scoring
from midlogit.engines.http.client import CallFailed
from midlogit.engines.http.paired_sides import IdsPair, ServedSide, SlotPair, TopPair
from midlogit.engines.http.rounds import ListWidth, PendingRound
from midlogit.engines.http.transfer import ReceivingServers
from midlogit.errors import EngineFailure
from midlogit.outputs import Decision
from midlogit.requests.scoring import Scored

ROWS = 64  # of a text that are requested at once


class ScoringServers(ReceivingServers, Scoring):
    """Takes texts to score, at most `max_num_seqs` of them at once."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._seats = asyncio.Semaphore(self.max_num_seqs)
        self._scoring: dict[int, asyncio.Task[None]] = {}  # by text

    @abstractmethod
    def _width_of(self, top_logprobs: int) -> ListWidth:
        """How many ids to request where so many candidates are to be reported."""

    def score(self, texts: list[Scored]) -> None:
        if self._closed:
            raise EngineFailure("The engine is closed.", "Open the pair again.")
        self.client.loop.call_soon_threadsafe(self._begin_scoring, texts)

    def forget(self, texts: list[Scored]) -> None:
        if not self._closed:
            self.client.loop.call_soon_threadsafe(self._end_scoring, texts)

    def _begin_scoring(self, texts: list[Scored]) -> None:
        for text in texts:
            task = self.client.loop.create_task(self._score(text))
            self._scoring[id(text)] = task
            task.add_done_callback(partial(self._scored, text))

    def _end_scoring(self, texts: list[Scored]) -> None:
        for text in texts:
            if task := self._scoring.get(id(text)):
                task.cancel()

    def _scored(self, text: Scored, _: asyncio.Task[None]) -> None:
        del self._scoring[id(text)]
        if self._closed and not text.is_finished:  # perhaps cancelled before its task had begun
            text.abort()

    async def _abort_scoring(self) -> None:
        tasks = list(self._scoring.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _score(self, text: Scored) -> None:
        """Scores one text, or says why it cannot be scored."""
        try:
            async with self._seats:
                await self._gate.wait()
                reading = self._gate.enter(PendingRound(time.perf_counter(), 1, self.base_version))
                try:
                    text.finish(await self._decisions(text))
                finally:
                    self._gate.leave(reading)
        except CallFailed as failure:
            text.fail(f"Prompt {text.request.index}: {failure.message}.")
        except Exception as error:  # the engine's own boundary: whoever waits for it must hear
            text.fail(f"The engine failed: {type(error).__name__}: {error}")

    async def _decisions(self, text: Scored) -> list[Decision]:
        request, settings = text.request, text.settings
        if not settings:
            return []

        sides = self.sides.base.replicas, self.sides.teacher.replicas
        prompts = request.base_ids, request.teacher_ids
        slots = sides[0].assign(prompts[0][:-1]), sides[1].assign(prompts[1][:-1])
        k = self._width_of(settings[0].top_logprobs).start
        try:
            await self.sides.read_top(
                self.sides.request_top(slots, k)
            )  # the servers cache its prefix

            for slot, prompt in zip(slots, prompts, strict=True):
                slot.prefix = list(prompt[: len(prompt) - len(settings)])
            decisions: list[Decision] = []
            for start in range(0, len(settings), ROWS):
                part = settings[start : start + ROWS]
                decisions += await self._decide(slots, part, k)
            text.weights_changed = self.sides.with_other_weights(slots)
        finally:
            for side, slot in zip(sides, slots, strict=True):
                side.release(slot)
        return decisions

    async def _decide(self, slots: SlotPair, settings: list[RowSettings], k: int) -> list[Decision]:
        """Decisions for the next given tokens, which join the prefixes of the slots."""
        given = [row.given for row in settings if row.given is not None]
        drafted = given[:-1]
        tops = zip(
            self.sides.base.replicas.top(slots[0], k, drafted),
            self.sides.teacher.replicas.top(slots[1], k, drafted),
            strict=True,
        )
        pairs = [await self.sides.read_top(rows) for rows in tops]

        missing = [self._missing_ids(*row) for row in zip(pairs, settings, given, strict=True)]
        pairs = await self.sides.with_scores(slots, pairs, missing, drafted)
        for slot in slots:
            slot.prefix += given
        return decide_truncated(pairs, settings, self.sides.vocabulary)

    def _missing_ids(self, pair: TopPair, settings: RowSettings, given: int) -> IdsPair:
        """What this position needs scores of: ids that only the other side lists, and the given one.

        Raises:
            CallFailed: a server that does not list the given id cannot score it.
        """
        missing = self.sides.missing_ids(pair, settings)
        for side, top, ids in zip(
            (self.sides.base, self.sides.teacher), pair, missing, strict=True
        ):
            if given not in top.logprobs and given not in ids and given < side.logit_size:
                ids.append(_scorable(given, side))
        return missing


def _scorable(token_id: int, side: ServedSide) -> int:
    if not side.scores:
        raise CallFailed(
            f"token {token_id} is not among the listed ids, and the server of the"
            f" {side.replicas.replicas[0].endpoint.name} scores no others; raise top_k",
            retryable=False,
        )
    return token_id

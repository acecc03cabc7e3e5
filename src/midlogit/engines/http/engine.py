"""Sampling from two servers: every sequence asks both sides for its next rows, and all that have them draw at once.

Knows sequences, sides and how wide the lists are; text, stops and α belong to the sequences and the policy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from midlogit.decide.base import Draft, RowSettings
from midlogit.decide.truncated.rows import SampledTokens, sample_truncated
from midlogit.engines.base import Engine
from midlogit.engines.draft_length import DraftLength
from midlogit.engines.http.client import CallFailed, Client
from midlogit.engines.http.pairs import Model, Pair, Pairs, Seats
from midlogit.engines.http.rows import Drafts, Step
from midlogit.engines.http.side import Row
from midlogit.errors import EngineFailure
from midlogit.outputs import Decision
from midlogit.requests.sequence import Sequence

T = TypeVar("T")

log = logging.getLogger("midlogit")

SENDING = 6  # turns of the loop within which aiohttp has written the calls that were asked for
WIDEN = 4  # by which an adaptive list grows when its bound is too wide
SLACK = 0.25  # share of the tolerance below which it shrinks again


@dataclass(frozen=True, slots=True)
class Width:
    """How many log-probabilities to ask of each side.

    Attributes:
        start: for the first row. most: what the servers allow.
        drafts: where the base drafts, of both; what is listed beyond `start` need not be scored.
        tolerance: on the certified bound, above which a row is asked again wider; None to stay at `start`.
    """

    start: int
    most: int
    drafts: int
    tolerance: float | None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a sequence has asked for its next round.

    Attributes:
        rows: of base and teacher, when nothing is drafted. drafts, steps: what the base drafts, else.
        since, batch: when it was asked for, and how many sequences ran.
    """

    since: float
    batch: int
    rows: tuple[Row, ...] = ()
    drafts: Drafts | None = None
    steps: asyncio.Future[list[Step]] | None = None

    def cancel(self) -> None:
        for future in self.rows if self.steps is None else (self.steps,):
            future.cancel()


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn token, None where nothing could be drawn, and what will be known of it."""

    token_id: int | None
    decision: asyncio.Future[Decision]


class HttpEngine(Engine):
    """Two servers, or several of each.

    Args:
        client: in whose loop everything runs; closed with the engine.
        vocabulary: ids below it are drawn from.
        draft_length: how many tokens the base's server drafts ahead; none while `width` adapts.
        blocking_text: whether the sequences' text comes from a server, so that it must be made off the loop.
    """

    def __init__(
        self,
        client: Client,
        base: Model,
        teacher: Model,
        *,
        vocabulary: int,
        width: Width,
        draft_length: DraftLength,
        blocking_text: bool,
    ) -> None:
        super().__init__(draft_length)
        self._client = client
        self._base = base
        self._teacher = teacher
        self._vocabulary = vocabulary
        self._pairs = Pairs(base, teacher, vocabulary)
        self._width = width
        self._blocking_text = blocking_text
        self._running: dict[int, asyncio.Task[None]] = {}
        self._ready: list[tuple[list[Pair], list[RowSettings], asyncio.Future[list[Draw]]]] = []
        self._closed = False
        self._warned = False

    def submit(self, sequence: Sequence) -> None:
        if self._closed:
            raise EngineFailure("The engine is closed.", "Open the pair again.")
        self._client.loop.call_soon_threadsafe(self._start, sequence)

    def abort(self, sequences: list[Sequence]) -> None:
        if not self._closed:
            self._client.loop.call_soon_threadsafe(self._cancel, [id(sequence) for sequence in sequences])

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._client.run(self._abort_all())
            self._client.close()

    def _start(self, sequence: Sequence) -> None:
        task = self._client.loop.create_task(self._run(sequence))
        self._running[id(sequence)] = task
        task.add_done_callback(lambda _: self._forget(sequence))

    def _forget(self, sequence: Sequence) -> None:
        del self._running[id(sequence)]
        if not sequence.is_finished:  # cancelled before its task had begun
            sequence.abort()

    def _cancel(self, keys: list[int]) -> None:
        for key in keys:
            if key in self._running:
                self._running[key].cancel()

    async def _abort_all(self) -> None:
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _run(self, sequence: Sequence) -> None:
        """One sequence from its prompt to its end, whatever the end is."""
        base, teacher = self._base.side, self._teacher.side
        seats = base.sit(sequence.request.base_ids), teacher.sit(sequence.request.teacher_ids)
        message: str | None = None
        try:
            await self._write(sequence, seats)
        except asyncio.CancelledError:
            pass
        except CallFailed as failure:
            where = f"Request {sequence.request.index}, position {len(sequence.token_ids)}"
            message = f"{where}: {failure.message}."
        except Exception as error:  # the engine's own boundary: whoever waits for this sequence must hear of it
            message = f"The engine failed: {type(error).__name__}: {error}"
        finally:
            base.leave(seats[0])
            teacher.leave(seats[1])
        if not sequence.is_finished:
            end = sequence.abort if message is None else partial(sequence.fail, message)
            await self._tell(end)

    async def _write(self, sequence: Sequence, seats: Seats) -> None:
        """Asks for the next rows as soon as tokens are drawn; what else there is to do with them, the servers cover."""
        k = self._width.start
        position = 0
        asked = self._ask(sequence, seats, position, k)
        try:
            while not sequence.is_finished:
                if asked.drafts is None or asked.steps is None:
                    draw, k = await self._next(seats, sequence.settings_at(position), asked.rows, k)
                    draws = [draw]
                else:
                    draws = await self._check(sequence, seats, position, asked.drafts, await asked.steps)
                self._measure(asked, position, draws)
                token_ids = [draw.token_id for draw in draws if draw.token_id is not None]
                for seat in seats:
                    seat.prefix += token_ids
                position += len(draws)
                if len(token_ids) == len(draws) and not sequence.ends_with(token_ids[-1], position - 1):
                    asked = self._ask(sequence, seats, position, k)
                for draw in draws:
                    await self._tell(sequence.append, await draw.decision)
                    if sequence.is_finished:
                        break
        finally:
            asked.cancel()  # of no use when a stop string was met

    def _ask(self, sequence: Sequence, seats: Seats, position: int, k: int) -> Asked:
        """Begins a round: with the base's drafts, or with a row of each side."""
        since, batch, ahead = time.perf_counter(), len(self._running), self._drafts(sequence, position)
        if not ahead:
            return Asked(since, batch, self._pairs.top(seats, k))
        drafts = Drafts.near(sequence.request.params.temperature, ahead + 1, sequence.draft_seed(position))
        return Asked(since, batch, drafts=drafts, steps=self._base.side.draft(seats[0], self._width.drafts, drafts))

    def _drafts(self, sequence: Sequence, position: int) -> int:
        """How many tokens to draft from a position on.

        None for the first token, whose prompts are read; none where they would change what a seed draws.
        """
        params = sequence.request.params
        if position == 0 or (params.seed is not None and params.temperature and not self.draft_length.fixed):
            return 0
        return min(self.draft_length.next(len(self._running)), sequence.remaining_tokens(position) - 1)

    def _measure(self, asked: Asked, position: int, draws: list[Draw]) -> None:
        """Tells what a round brought and took; the first reads prompts, which says nothing of the others."""
        ahead = 0 if asked.drafts is None else asked.drafts.ahead
        self.draft_length.record_acceptance(ahead, [len(draws) - 1])
        if position and asked.batch.bit_length() == len(self._running).bit_length():
            self.draft_length.record_time(asked.batch, ahead, time.perf_counter() - asked.since)

    async def _check(
        self, sequence: Sequence, seats: Seats, position: int, drafts: Drafts, steps: list[Step]
    ) -> list[Draw]:
        """Has the teacher look at drafts; draws up to the first that does not stand, scoring ids when it must."""
        drafted = self._worth_checking(sequence, steps)
        asked = self._teacher.side.top(seats[1], self._width.drafts, drafted)
        settings = [
            replace(sequence.settings_at(position + n), draft=_served(drafts, *steps[n])) for n in range(len(asked))
        ]
        rows = [(step[0], await row) for step, row in zip(steps, asked, strict=False)]
        cut = [self._pairs.cut(wide, self._width.start, s) for wide, s in zip(rows, settings, strict=True)]
        pairs, unknown = [pair for pair, _ in cut], [ids for _, ids in cut]
        ready = next((n for n, ids in enumerate(unknown) if any(ids)), len(pairs))
        draws = await self._draw(pairs[:ready], settings[:ready]) if ready else []
        stood = _standing(draws, drafted)
        if stood == ready:
            pairs = await self._pairs.scored(seats, pairs, unknown, drafted)
            draws += await self._draw(pairs[ready:], settings[ready:])
            stood = _standing(draws, drafted)
        return draws[: stood + 1]

    def _worth_checking(self, sequence: Sequence, steps: list[Step]) -> list[int]:
        """The drafts before one that ends the sequence, cannot be drawn or was not listed; nothing follows the last."""
        hidden = sequence.request.outcomes.masked_before_end
        drafted: list[int] = []
        for row, token_id in steps[:-1]:
            if token_id not in row or token_id in hidden or token_id >= self._vocabulary:
                break
            drafted.append(token_id)
        return drafted

    async def _next(self, seats: Seats, settings: RowSettings, asked: tuple[Row, ...], k: int) -> tuple[Draw, int]:
        """The next token and the width to begin the one after it with."""
        width = self._width
        while True:
            pairs = [await self._pairs.listed(asked)]
            unknown = self._pairs.unknown(pairs[0], settings)
            if any(unknown):
                pairs = await self._pairs.scored(seats, pairs, [unknown])
            draw = (await self._draw(pairs, [settings]))[0]
            if width.tolerance is None:
                return draw, k
            bound = (await draw.decision).tv_bound
            if bound <= width.tolerance or k >= width.most:
                break
            k = min(WIDEN * k, width.most)
            asked = self._pairs.top(seats, k)
        if bound > width.tolerance:
            self._warn(width.tolerance)
        elif bound <= SLACK * width.tolerance:
            k = max(k // 2, width.start)
        return draw, k

    async def _draw(self, pairs: list[Pair], settings: list[RowSettings]) -> list[Draw]:
        """Draws for every sequence that has its rows in this turn of the loop, together."""
        draws: asyncio.Future[list[Draw]] = self._client.loop.create_future()
        self._ready.append((pairs, settings, draws))
        if len(self._running) == 1:  # nobody to wait for
            self._draw_all()
        elif len(self._ready) == 1:
            self._client.loop.call_soon(self._draw_all)
        return await draws

    def _draw_all(self) -> None:
        ready, self._ready = self._ready, []
        waiting = [draws for _, _, draws in ready]
        pairs = [pair for some, _, _ in ready for pair in some]
        settings = [s for _, some, _ in ready for s in some]
        try:
            drawn = sample_truncated(pairs, settings, self._vocabulary)
            draws = [Draw(token_id, self._client.loop.create_future()) for token_id in drawn.token_ids]
        except Exception as error:  # it must reach the sequences that wait
            _fail(waiting, error)
            return
        one_by_one = iter(draws)
        _give(waiting, [[next(one_by_one) for _ in some] for some, _, _ in ready])
        turns = SENDING if self._width.tolerance is None else 0
        self._describe(turns, drawn, [draw.decision for draw in draws])

    def _describe(self, turns: int, drawn: SampledTokens, waiting: list[asyncio.Future[Decision]]) -> None:
        """What a draw leaves for later, so many turns of the loop from now."""
        if turns:
            self._client.loop.call_soon(self._describe, turns - 1, drawn, waiting)
            return
        try:
            decisions = drawn.decisions()
        except Exception as error:
            _fail(waiting, error)
        else:
            _give(waiting, decisions)

    async def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        """Runs what makes text: here, or beside the loop when a server makes it."""
        if self._blocking_text:
            work = self._client.loop.run_in_executor(None, call, *arguments)
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                await work  # nobody else may touch the sequence before
                raise
        else:
            call(*arguments)

    def _warn(self, tolerance: float) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "top_k='auto': some bounds stay above the tolerance of %g with the %d log-probabilities that the "
                "servers allow; start them with a higher --max-logprobs. Each token's bound is in its diagnostics.",
                tolerance,
                self._width.most,
            )


def _served(drafts: Drafts, row: dict[int, float], token_id: int) -> Draft | None:
    """A draft with the law that it has where it lies in the server's list; None where it does not, or has none."""
    return Draft(token_id, drafts.law(row)) if drafts.temperature and token_id in row else None


def _standing(draws: list[Draw], drafted: list[int]) -> int:
    """How many drafts were drawn before the first that was not."""
    pairs = zip(draws, drafted, strict=False)
    return next(
        (n for n, (draw, token_id) in enumerate(pairs) if draw.token_id != token_id), min(len(draws), len(drafted))
    )


def _give(waiting: list[asyncio.Future[T]], results: list[T]) -> None:
    for future, result in zip(waiting, results, strict=True):
        if not future.done():
            future.set_result(result)


def _fail(waiting: list[asyncio.Future[T]], error: Exception) -> None:
    for future in waiting:
        if not future.done():
            future.set_exception(error)

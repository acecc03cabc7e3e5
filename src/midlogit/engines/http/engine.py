"""Sampling from two servers: every sequence asks both sides for its next rows, and all that have them draw at once.

Knows sequences, sides and how wide the lists are; text, stops and α belong to the sequences and the policy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from midlogit.engines.base import Engine
from midlogit.engines.http.client import CallFailed, Client
from midlogit.engines.http.side import Seat, Side
from midlogit.errors import EngineFailure
from midlogit.outputs import FinishReason
from midlogit.sampling.decision import Decision, RowSettings
from midlogit.sampling.drafting import Drafting
from midlogit.sampling.listed import Listed, unlisted_ids
from midlogit.sampling.policy import Drawn, draw_listed
from midlogit.sampling.sequence import Sequence

T = TypeVar("T")
Rows = tuple[asyncio.Future[dict[int, float]], asyncio.Future[dict[int, float]]]  # of base and teacher

log = logging.getLogger("midlogit")

SENDING = 6  # turns of the loop within which aiohttp has written the calls that were asked for
WIDEN = 4  # by which an adaptive list grows when its bound is too wide
SLACK = 0.25  # share of the tolerance below which it shrinks again


@dataclass(frozen=True, slots=True)
class Width:
    """How many log-probabilities to ask of each side.

    Attributes:
        start: for the first row. most: what the servers allow.
        tolerance: on the certified bound, above which a row is asked again wider; None to stay at `start`.
    """

    start: int
    most: int
    tolerance: float | None


@dataclass(frozen=True, slots=True)
class Model:
    """One side as the engine sees it: where rows come from, how many ids it has, whether it scores chosen ids."""

    side: Side
    logit_size: int
    scores: bool

    def listed(self, row: dict[int, float]) -> Listed:
        return Listed(row, min(row.values()), self.logit_size)


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
        blocking_text: whether the sequences' text comes from a server, so that it must be made off the loop.
    """

    def __init__(
        self, client: Client, base: Model, teacher: Model, *, vocabulary: int, width: Width, blocking_text: bool
    ) -> None:
        super().__init__(Drafting("off"))
        self._client = client
        self._base = base
        self._teacher = teacher
        self._vocabulary = vocabulary
        self._width = width
        self._blocking_text = blocking_text
        self._running: dict[int, asyncio.Task[None]] = {}
        self._ready: list[tuple[tuple[Listed, Listed], RowSettings, asyncio.Future[Draw]]] = []
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
            sequence.end("abort")

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
        reason: FinishReason = "abort"
        message: str | None = None
        try:
            await self._write(sequence, seats)
        except asyncio.CancelledError:
            pass
        except CallFailed as failure:
            where = f"Request {sequence.request.index}, position {len(sequence.token_ids)}"
            reason, message = "error", f"{where}: {failure.message}."
        except Exception as error:  # the engine's own boundary: whoever waits for this sequence must hear of it
            reason, message = "error", f"The engine failed: {type(error).__name__}: {error}"
        finally:
            base.leave(seats[0])
            teacher.leave(seats[1])
        if not sequence.is_finished:
            await self._tell(sequence.end, reason, None, message)

    async def _write(self, sequence: Sequence, seats: tuple[Seat, Seat]) -> None:
        """Asks for the next rows as soon as a token is drawn; what else there is to do with it, the servers cover."""
        k = self._width.start
        rows = self._ask(seats, k)
        try:
            while not sequence.is_finished:
                draw, k = await self._next(seats, sequence.next_settings, rows, k)
                if draw.token_id is not None and not sequence.ends_with(draw.token_id):
                    for seat in seats:
                        seat.prefix.append(draw.token_id)
                    rows = self._ask(seats, k)
                await self._tell(sequence.append, await draw.decision)
        finally:
            for row in rows:
                row.cancel()  # of no use when a stop string was met

    def _ask(self, seats: tuple[Seat, Seat], k: int) -> Rows:
        return self._base.side.top(seats[0], k), self._teacher.side.top(seats[1], k)

    async def _next(self, seats: tuple[Seat, Seat], settings: RowSettings, asked: Rows, k: int) -> tuple[Draw, int]:
        """The next token and the width to begin the one after it with."""
        width = self._width
        while True:
            lists = self._base.listed(await asked[0]), self._teacher.listed(await asked[1])
            pair = await self._score(seats, *lists, settings)
            draw = await self._draw(pair, settings)
            if width.tolerance is None:
                return draw, k
            bound = (await draw.decision).bound
            if bound <= width.tolerance or k >= width.most:
                break
            k = min(WIDEN * k, width.most)
            asked = self._ask(seats, k)
        if bound > width.tolerance:
            self._warn(width.tolerance)
        elif bound <= SLACK * width.tolerance:
            k = max(k // 2, width.start)
        return draw, k

    async def _score(
        self, seats: tuple[Seat, Seat], base: Listed, teacher: Listed, settings: RowSettings
    ) -> tuple[Listed, Listed]:
        """Both lists with the log-probabilities that only the other named, as far as the servers score them."""
        wanted = unlisted_ids(base, teacher, settings, self._vocabulary)
        sides = zip((base, teacher), (self._base, self._teacher), seats, wanted, strict=True)
        # Both sides are asked before either is waited for.
        asked = [(row, model.side.score(seat, ids) if model.scores else []) for row, model, seat, ids in sides]
        lists = []
        for row, parts in asked:
            for part in parts:
                row = replace(row, logprobs=row.logprobs | await part)
            lists.append(row)
        return lists[0], lists[1]

    async def _draw(self, pair: tuple[Listed, Listed], settings: RowSettings) -> Draw:
        """Draws for every sequence that has its rows in this turn of the loop, together."""
        draw: asyncio.Future[Draw] = self._client.loop.create_future()
        self._ready.append((pair, settings, draw))
        if len(self._running) == 1:  # nobody to wait for
            self._draw_all()
        elif len(self._ready) == 1:
            self._client.loop.call_soon(self._draw_all)
        return await draw

    def _draw_all(self) -> None:
        ready, self._ready = self._ready, []
        waiting = [draw for _, _, draw in ready]
        try:
            drawn = draw_listed([pair for pair, _, _ in ready], [s for _, s, _ in ready], self._vocabulary)
            draws = [Draw(token_id, self._client.loop.create_future()) for token_id in drawn.token_ids()]
        except Exception as error:  # it must reach the sequences that wait
            _fail(waiting, error)
            return
        _give(waiting, draws)
        turns = SENDING if self._width.tolerance is None else 0
        self._describe(turns, drawn, [draw.decision for draw in draws])

    def _describe(self, turns: int, drawn: Drawn, waiting: list[asyncio.Future[Decision]]) -> None:
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


def _give(waiting: list[asyncio.Future[T]], results: list[T]) -> None:
    for future, result in zip(waiting, results, strict=True):
        if not future.done():
            future.set_result(result)


def _fail(waiting: list[asyncio.Future[T]], error: Exception) -> None:
    for future in waiting:
        if not future.done():
            future.set_exception(error)

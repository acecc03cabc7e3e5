"""Delivery of results to the caller: as an iterator, a stream or asyncio events; knows sequences and the engine seam.

Knows no prompts and no parameters. Whoever leaves early, by Ctrl-C or by cancelling a task, aborts what still runs.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import suppress
from typing import Any, Self, TypeVar

from midlogit.engines.base import Engine, Scoring
from midlogit.errors import InvalidRequest
from midlogit.models.detokenize import Detokenizer
from midlogit.outputs import Completion, Scores, Token
from midlogit.requests.scoring import Scored, ScoreRequest
from midlogit.requests.sequence import Request
from midlogit.requests.sequence import Sequence as Running

Event = Token | Completion
T = TypeVar("T")


class Batch:
    """The completions of one call, as they end; an iterator.

    Attributes:
        size: how many there will be.
    """

    def __init__(
        self, engine: Engine, running: list[Running], events: queue.SimpleQueue[Event]
    ) -> None:
        self.size = len(running)
        self._engine = engine
        self._running = running
        self._events = events
        self._delivered: set[tuple[int, int]] = set()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Completion:
        while not self.is_over:
            if isinstance(event := self.poll(0.1), Completion):
                return event
        raise StopIteration

    @property
    def is_over(self) -> bool:
        """Whether every completion was yielded."""
        return len(self._delivered) == self.size

    @property
    def ended(self) -> list[Completion]:
        """Every completion there is by now, yielded or not, in the order of the requests."""
        return [
            sequence.completion for sequence in self._running if sequence.completion is not None
        ]

    def poll(self, seconds: float) -> Event | None:
        """The next event, None when nothing comes in time: a completion, before it its tokens where they are streamed.

        Ctrl-C is noticed when the time is over, at the latest.
        """
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None

        if isinstance(event, Completion):
            self._delivered.add((event.index, event.sample))
        return event

    def abort(self) -> None:
        """Ends what still runs; its completions come with finish_reason "abort" and what they had."""
        self._engine.abort(self._running)

    def stop(self) -> list[Completion]:
        """Aborts what still runs and returns every completion not yet yielded, with what it had."""
        self.abort()
        while not all(sequence.is_finished for sequence in self._running):
            with suppress(queue.Empty):
                self._events.get(timeout=0.1)

        rest = [c for c in self.ended if (c.index, c.sample) not in self._delivered]
        self._delivered.update((c.index, c.sample) for c in rest)
        return rest


class Delivery:
    """Runs requests on an engine and delivers their events.

    Args:
        detokenizer: gives the detokenizer of the completions' text.
        on_end: told of each ended sequence, in the engine's thread, before its completion is delivered.
    """

    def __init__(
        self,
        engine: Engine,
        detokenizer: Callable[[], Detokenizer],
        on_end: Callable[[Running], None],
    ) -> None:
        self._engine = engine
        self._detokenizer = detokenizer
        self._on_end = on_end

    def batch(self, requests: Sequence[Request]) -> Batch:
        """Starts requests; their completions as they end."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        return Batch(self._engine, self._submit(requests, events.put), events)

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """Starts a request at once; yields its tokens, then its completion."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        return self._events_until_end(self._submit([request], events.put), events)

    def _events_until_end(
        self, running: list[Running], events: queue.SimpleQueue[Event]
    ) -> Generator[Event, None, None]:
        try:
            while True:
                event = wait_for(events)
                yield event
                if isinstance(event, Completion):
                    return
        finally:
            self._engine.abort(running)

    async def events(self, requests: Sequence[Request]) -> AsyncGenerator[Event, None]:
        """Runs requests; yields the events of all of them as they come, until each has its completion."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        running = self._submit(requests, lambda event: _call_in(loop, events.put_nowait, event))
        remaining = len(running)
        try:
            while remaining:
                event = await events.get()
                remaining -= isinstance(event, Completion)
                yield event
        finally:
            if remaining:
                self._engine.abort(running)

    def scores(self, requests: Sequence[Request]) -> list[Scores]:
        """Scores the prompts of requests, in their order; Ctrl-C drops those that still wait.

        Raises:
            InvalidRequest: the engine cannot score given text.
        """
        engine = self._scoring_engine()
        found: queue.SimpleQueue[Scores] = queue.SimpleQueue()
        texts = [Scored(ScoreRequest.of(request), found.put) for request in requests]
        try:
            engine.score(texts)
            return sorted((wait_for(found) for _ in texts), key=lambda scores: scores.index)
        except KeyboardInterrupt:
            engine.forget(texts)
            raise

    async def scores_async(self, requests: Sequence[Request]) -> list[Scores]:
        """`scores` for asyncio; cancelling the task drops those that still wait."""
        engine = self._scoring_engine()
        loop = asyncio.get_running_loop()
        found: asyncio.Queue[Scores] = asyncio.Queue()
        texts = [
            Scored(
                ScoreRequest.of(request), lambda scores: _call_in(loop, found.put_nowait, scores)
            )
            for request in requests
        ]
        engine.score(texts)
        try:
            return sorted([await found.get() for _ in texts], key=lambda scores: scores.index)
        except asyncio.CancelledError:
            engine.forget(texts)
            raise

    def _scoring_engine(self) -> Scoring:
        if not isinstance(self._engine, Scoring):
            raise InvalidRequest("This engine cannot score given text.", "Pair.local can.")
        return self._engine

    def _submit(
        self, requests: Sequence[Request], listener: Callable[[Event], None]
    ) -> list[Running]:
        detokenizer = self._detokenizer()
        running: list[Running] = []

        def listener_of(number: int) -> Callable[[Event], None]:
            def hear(event: Event) -> None:
                if isinstance(event, Completion):
                    self._on_end(running[number])
                listener(event)

            return hear

        running += [
            Running(request, detokenizer, listener_of(number))
            for number, request in enumerate(requests)
        ]
        for sequence in running:
            if sequence.request.error is None:
                self._engine.submit(sequence)
            else:
                sequence.fail(sequence.request.error)
        return running


def wait_for(items: queue.SimpleQueue[T]) -> T:
    """The next item of a queue, however long it takes; Ctrl-C ends the wait within a tenth of a second.

    A plain `get` would not always end: a signal that another thread receives, or this one just before it sleeps, is
    only noticed when the queue's next item wakes it.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    while True:
        with suppress(queue.Empty):
            return items.get(timeout=0.1)


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[..., Any], *arguments: Any) -> None:
    """Runs a call in an event loop from the engine's thread; a loop that has closed listens no more."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)

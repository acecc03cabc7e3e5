"""Delivery of results to the caller: as an iterator, a stream or asyncio events; knows sequences and the engine seam.

Knows no prompts and no parameters. Whoever leaves early, by Ctrl-C or by cancelling a task, aborts what still runs.
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, Self, TypeVar

from midlogit.engines.base import Engine, Scoring
from midlogit.errors import EngineFailure, InvalidRequest
from midlogit.models.detokenize import Detokenizer
from midlogit.outputs import Completion, Scores, Token
from midlogit.requests.scoring import Scored, ScoreRequest
from midlogit.requests.sequence import Listener, Request
from midlogit.requests.sequence import Sequence as Running

Event = Token | Completion
T = TypeVar("T")


class Batch:
    """Requests that run together; an iterator of their completions as they end, in whatever order they do.

    Keeps nothing of what was delivered. More requests may be submitted at any time, or read from an iterator.

    Args:
        on_completion: told of each completion in the engine's thread, before it is delivered; None for nobody.
    """

    def __init__(
        self, delivery: Delivery, on_completion: Callable[[Completion], None] | None = None
    ) -> None:
        self._delivery = delivery
        self._on_completion = on_completion
        self._events: queue.SimpleQueue[tuple[Running, Event]] = queue.SimpleQueue()
        self._undelivered: dict[int, Running] = {}  # by id, in the order of submission
        self._unread: Iterator[Request] | None = None
        self._window = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Completion:
        while not self.is_over:
            if isinstance(event := self.poll(0.1), Completion):
                return event
        raise StopIteration

    @property
    def is_over(self) -> bool:
        """Whether the completion of every request so far was delivered, and no more are to be read."""
        return not self._undelivered and self._unread is None

    @property
    def num_running(self) -> int:
        """Requests that were submitted and whose completions were not yet delivered."""
        return len(self._undelivered)

    def submit(self, requests: Iterable[Request]) -> None:
        """Adds prepared requests to those that run.

        Raises:
            EngineFailure: the engine is closed or has failed; what ran before still delivers its completions.
        """
        unsubmitted = deque(self._delivery.sequence(request, self._hear) for request in requests)
        self._undelivered |= {id(sequence): sequence for sequence in unsubmitted}
        try:
            while unsubmitted:
                self._delivery.submit(unsubmitted[0])
                unsubmitted.popleft()
        except EngineFailure:
            for sequence in unsubmitted:
                del self._undelivered[id(sequence)]
            raise

    def read_from(self, requests: Iterator[Request], window: int) -> None:
        """Reads and submits requests, now and in each `poll`, while fewer than `window` are undelivered.

        If one cannot be read, nothing more is, and what runs is aborted; `stop` returns what is still undelivered.

        Raises:
            Exception: what reading a request raises, here and in `poll`.
            EngineFailure: as `submit`.
        """
        self._unread, self._window = requests, window
        self._refill()

    def poll(self, seconds: float) -> Event | None:
        """The next event, None when nothing comes in time: a completion, before it its tokens where they are streamed.

        Ctrl-C is noticed when the time is over, at the latest.
        """
        self._refill()
        try:
            sequence, event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None

        if id(sequence) not in self._undelivered:  # `stop` has returned its completion
            return None
        if isinstance(event, Completion):
            del self._undelivered[id(sequence)]
        return event

    def abort(self) -> None:
        """Ends what still runs, with finish_reason "abort" and what it had, and reads no more."""
        self._unread = None
        self._delivery.abort(list(self._undelivered.values()))

    def stop(self) -> list[Completion]:
        """Aborts what still runs, and reads no more.

        Returns:
            Every completion not yet delivered, with what it had, in the order of submission.
        """
        self.abort()
        while not all(sequence.is_finished for sequence in self._undelivered.values()):
            with suppress(queue.Empty):
                self._events.get(timeout=0.1)

        rest = [sequence.completion for sequence in self._undelivered.values()]
        self._undelivered.clear()
        return [completion for completion in rest if completion is not None]

    def _refill(self) -> None:
        try:
            while self._unread is not None and len(self._undelivered) < self._window:
                request = next(self._unread, None)
                if request is None:
                    self._unread = None
                else:
                    self.submit([request])
        except BaseException:
            self.abort()
            raise

    def _hear(self, sequence: Running, event: Event) -> None:
        if isinstance(event, Completion) and self._on_completion is not None:
            self._on_completion(event)
        self._events.put((sequence, event))


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
        self._aborts = 0  # how often all requests were ended

    def abort_unsubmitted(self) -> None:
        """Ends what `events` has not submitted so far; what runs is the engine's to end."""
        self._aborts += 1

    def sequence(self, request: Request, listener: Listener) -> Running:
        """The state of a request that does not run yet."""
        return Running(request, self._detokenizer(), partial(self._hear, listener))

    def submit(self, sequence: Running) -> None:
        """Runs a sequence; one whose prompt cannot be honoured ends at once.

        Raises:
            EngineFailure: the engine is closed or has failed.
        """
        if sequence.request.error is None:
            self._engine.submit(sequence)
        else:
            sequence.fail(sequence.request.error, "request")

    def abort(self, running: list[Running]) -> None:
        """Ends those of the sequences that still run."""
        self._engine.abort(running)

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """Starts a request at once; yields its tokens, then its completion."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        running = self._submit_all([request], events.put)
        return self._events_until_end(running, events)

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
            self.abort(running)

    async def events(self, requests: Iterable[Request], window: int) -> AsyncGenerator[Event, None]:
        """Runs requests; yields the events of all of them as they come, until each has its completion.

        Args:
            window: most requests that are with the engine; the others are read as these end.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[Running, Event]] = asyncio.Queue()
        unread, aborts = iter(requests), self._aborts
        running: dict[int, Running] = {}

        def hear(sequence: Running, event: Event) -> None:
            _call_in(loop, events.put_nowait, (sequence, event))

        try:
            while True:
                for request in islice(unread, window - len(running)):
                    sequence = self.sequence(request, hear)
                    running[id(sequence)] = sequence
                    if aborts == self._aborts:
                        self.submit(sequence)
                    else:
                        sequence.abort()
                if not running:
                    return

                sequence, event = await events.get()
                if isinstance(event, Completion):
                    del running[id(sequence)]
                yield event
                if not events.empty():
                    await asyncio.sleep(0)  # a reader that lags behind does not keep others waiting
        finally:
            if running:
                self.abort(list(running.values()))

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

        def hear(scores: Scores) -> None:
            _call_in(loop, found.put_nowait, scores)

        def texts_of() -> list[Scored]:
            return [Scored(ScoreRequest.of(request), hear) for request in requests]

        texts = await asyncio.to_thread(texts_of)
        engine.score(texts)
        try:
            return sorted([await found.get() for _ in texts], key=lambda scores: scores.index)
        except asyncio.CancelledError:
            engine.forget(texts)
            raise

    def _scoring_engine(self) -> Scoring:
        if not isinstance(self._engine, Scoring):
            raise InvalidRequest("This engine cannot score given text.")
        return self._engine

    def _submit_all(
        self, requests: Sequence[Request], listener: Callable[[Event], None]
    ) -> list[Running]:
        running = [self.sequence(request, lambda _, event: listener(event)) for request in requests]
        for sequence in running:
            self.submit(sequence)
        return running

    def _hear(self, listener: Listener, sequence: Running, event: Event) -> None:
        try:
            if isinstance(event, Completion):
                self._on_end(sequence)
        finally:
            listener(sequence, event)


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

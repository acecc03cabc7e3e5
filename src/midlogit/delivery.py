"""The completions of one call as they end, and how to stop the rest; knows sequences, not what runs them."""

from __future__ import annotations

import queue
from contextlib import suppress
from typing import Self, TypeVar

from midlogit.engines.base import Engine
from midlogit.outputs import Completion, Token
from midlogit.requests.sequence import Sequence as Running

Event = Token | Completion
Item = TypeVar("Item")


def wait_for(items: queue.SimpleQueue[Item]) -> Item:
    """The next item of a queue, however long it takes; Ctrl-C ends the wait within a tenth of a second.

    A plain `get` would not always: a signal that another thread receives, or this one just before it sleeps, is only
    noticed when the queue's next item wakes it.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    while True:
        with suppress(queue.Empty):
            return items.get(timeout=0.1)


class Batch:
    """The completions of one call, as they end; an iterator.

    Attributes:
        size: how many there will be.
    """

    def __init__(self, engine: Engine, running: list[Running], events: queue.SimpleQueue[Event]) -> None:
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
        return [sequence.completion for sequence in self._running if sequence.completion is not None]

    def poll(self, seconds: float) -> Event | None:
        """The next event, None when nothing comes in time: a completion, before it its tokens where they are streamed.

        Ctrl-C is noticed at the latest when the time is over.
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

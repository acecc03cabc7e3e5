"""Records and times of the engine's steps, for benchmarks and tests; knows times and counts, no model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

_UNTIMED: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of the engine.

    Attributes:
        time: when the tokens of the round before were on the host, by `time.perf_counter`.
        batch_size: sequences in that round; 0 where the step before decided nothing.
        num_drafts: γ of that round, 0 in lock-step.
        num_tokens: tokens that it gave to its sequences.
        num_bonus: sequences whose first token was decided early, by a bonus row of the teacher.
        num_stood: guesses that were the base's drafts.
        seconds: time of the engine's thread by part of this step; the parts add up to the whole step.
    """

    time: float
    batch_size: int
    num_drafts: int
    num_tokens: int
    num_bonus: int
    num_stood: int
    seconds: Mapping[str, float]


Observer = Callable[[StepRecord], None]


class StepClock:
    """Adds up the seconds per part of a step while it is on; parts do not nest."""

    def __init__(self) -> None:
        self.is_on = False
        self._seconds: dict[str, float] = {}

    def part(self, name: str) -> AbstractContextManager[None]:
        """Times a `with` block; costs next to nothing while the clock is off."""
        return self._timed(name) if self.is_on else _UNTIMED

    def take(self) -> dict[str, float]:
        """Returns the seconds by part since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

"""Queues of parts: a worker's own share first, then what others have not begun; knows files, no engine."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midlogit.errors import InvalidRequest
from midlogit.jobs.claims import Presence
from midlogit.jobs.run_folder import RunFolder

LOOK_S = 1.0  # between looks at what other workers have done
# (variable of the index, variable of the number): Slurm arrays, Kubernetes indexed jobs, SkyPilot
LAUNCHERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", None),
    ("SKYPILOT_JOB_RANK", "SKYPILOT_NUM_JOBS", None),
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", None),
)


@dataclass(frozen=True, slots=True)
class WorkerRole:
    """Which of several workers a process is.

    Attributes:
        index: from 0. count: workers in all.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InvalidRequest(
                f"The worker is {self.index} of {self.count}.", "Workers are 0/n to (n - 1)/n."
            )

    @classmethod
    def parse(cls, text: str | None, environment: Mapping[str, str] = os.environ) -> WorkerRole:
        """The role that a text such as "3/8" names; without one that of the launcher's variables, else 0/1.

        Raises:
            InvalidRequest: no such text, or numbers out of range.
        """
        if text is None:
            return cls._of_launcher(environment)
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise InvalidRequest(
                f"The worker is {text!r}.", "Write it as INDEX/COUNT, such as 0/8."
            )
        return cls(int(index), int(count))

    @classmethod
    def _of_launcher(cls, environment: Mapping[str, str]) -> WorkerRole:
        for index, count, first in LAUNCHERS:
            if index in environment and count in environment:
                offset = int(environment.get(first, "0")) if first else 0
                return cls(int(environment[index]) - offset, int(environment[count]))
        return cls()

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class SharedQueue:
    """The unfinished parts of a job, shared with other workers through claims.

    Args:
        parts: those to work on. retry: whether they are done already, and are made again.
    """

    def __init__(
        self,
        folder: RunFolder,
        presence: Presence,
        role: WorkerRole,
        parts: Sequence[int],
        *,
        retry: bool = False,
    ) -> None:
        self._folder = folder
        self._presence = presence
        self._retry = retry
        self._new = deque(sorted(parts, key=lambda part: part % role.count != role.index))
        self._held: list[int] = []  # claimed by other workers
        self._next_look = 0.0

    @property
    def is_over(self) -> bool:
        return not self._new and not self._held

    def next(self) -> int | None:
        if not self._new and self._held and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            self._new.extend(self._held)
            self._held.clear()

        while self._new:
            part = self._new.popleft()
            if self._is_done(part):
                continue
            if not self._presence.claim(part):
                self._held.append(part)
            elif self._is_done(part):  # by whoever had the claim until now
                self._presence.release(part)
            else:
                return part
        return None

    def _is_done(self, part: int) -> bool:
        return not self._retry and self._folder.results_file(part).exists()

    def committed(self, part: int, footer: dict[str, Any]) -> None:
        self._presence.release(part)

    def left(self, part: int) -> None:
        self._presence.release(part)


class SinglePart:
    """One part that a launcher assigned to this process.

    Attributes:
        footer: of its results, once it is committed.
    """

    def __init__(self, part: int) -> None:
        self._waiting = [part]
        self.footer: dict[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        return not self._waiting

    def next(self) -> int | None:
        return self._waiting.pop() if self._waiting else None

    def committed(self, part: int, footer: dict[str, Any]) -> None:
        self.footer = footer

    def left(self, part: int) -> None:
        pass

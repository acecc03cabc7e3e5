"""The seam that every engine fills: submit sequences, abort them, close; knows no model.

Engines run in the background. A sequence's listener is called from the engine's thread.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from midlogit.engines.draft_length import DraftLength
from midlogit.errors import EngineFailure
from midlogit.requests.scoring import Scored
from midlogit.requests.sequence import Sequence


class Engine(ABC):
    """Runs sequences to their end.

    Attributes:
        draft_length: chooses the number of drafts per round, and counts accepted drafts.
        max_num_seqs: most sequences that run at once; more wait, in their order.
    """

    def __init__(self, draft_length: DraftLength, max_num_seqs: int) -> None:
        self.draft_length = draft_length
        self.max_num_seqs = max_num_seqs

    @abstractmethod
    def submit(self, sequence: Sequence) -> None:
        """Takes a sequence; it begins when there is room for it.

        Raises:
            EngineFailure: the engine is closed or has failed.
        """

    @abstractmethod
    def abort(self, sequences: list[Sequence]) -> None:
        """Ends those of the sequences that still run, with finish_reason "abort"."""

    @abstractmethod
    def close(self) -> None:
        """Aborts what runs and frees the models; may be called twice."""


class Scoring(ABC):
    """The capability of an engine to score given text."""

    @abstractmethod
    def score(self, texts: list[Scored]) -> None:
        """Takes texts to score; each listener hears its scores.

        Raises:
            EngineFailure: the engine is closed or has failed.
        """

    @abstractmethod
    def forget(self, texts: list[Scored]) -> None:
        """Drops those of the texts that still wait to be scored; their listeners hear nothing."""


class Job(Protocol):
    """Work of a stepping engine: a sequence to sample, or a text to score."""

    @property
    def is_finished(self) -> bool: ...

    def abort(self) -> None:
        """Ends the job because nobody wants it any more."""

    def fail(self, message: str) -> None:
        """Ends the job with an error of the engine."""


J = TypeVar("J", bound=Job)


class SteppingEngine(Engine, Generic[J]):
    """An engine that advances all its jobs together, step by step, in a thread of its own.

    A subclass gives `step`, `add` and `remove`, and whoever opens it calls `start` once it is built. If `step` raises,
    every live job ends with the error and what it had, and the engine takes no more.
    """

    def __init__(self, draft_length: DraftLength, max_num_seqs: int) -> None:
        super().__init__(draft_length, max_num_seqs)
        self._inbox: queue.SimpleQueue[tuple[str, list[J]]] = queue.SimpleQueue()
        self._live: dict[int, J] = {}
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="midlogit-engine", daemon=True)

    @abstractmethod
    def step(self) -> None:
        """Advances every running job, starting waiting ones where there is room."""

    @abstractmethod
    def add(self, job: J) -> None:
        """Appends a new job to the waiting queue."""

    @abstractmethod
    def remove(self, job: J) -> None:
        """Forgets a job, waiting or running."""

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread.start()

    @property
    def num_live(self) -> int:
        """Jobs that wait or run."""
        return len(self._live)

    def close(self) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = "The engine is closed."
                self._inbox.put(("close", []))

        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _take(self, jobs: list[J]) -> None:
        """Hands new jobs to the engine's thread.

        Raises:
            EngineFailure: the engine is closed or has failed.
        """
        with self._lock:
            if self._failure is not None:
                raise EngineFailure(self._failure, "Open the pair again.")
            self._inbox.put(("add", jobs))

    def _drop(self, jobs: list[J], *, silently: bool = False) -> None:
        """Has the engine's thread remove those of the jobs that still live, and abort them unless `silently`."""
        self._inbox.put(("forget" if silently else "abort", jobs))

    def _run(self) -> None:
        try:
            while self._handle_messages():
                if self._live:
                    self.step()
                    self._forget_finished()
        except Exception as error:  # the engine's own boundary: everyone who waits must hear of it
            self._fail(error)

    def _handle_messages(self) -> bool:
        """Handles all messages, waiting for one when there is no job; False once closed."""
        while True:
            try:
                kind, jobs = self._inbox.get(block=not self._live)
            except queue.Empty:
                return True

            if kind == "close":
                for job in self._live.values():
                    job.abort()
                self._live.clear()
                return False
            self._handle(kind, jobs)

    def _handle(self, kind: str, jobs: list[J]) -> None:
        for job in jobs:
            if kind == "add":
                self._live[id(job)] = job
                self.add(job)
            elif id(job) in self._live:
                self.remove(self._live.pop(id(job)))
                if kind == "abort":
                    job.abort()

    def _forget_finished(self) -> None:
        self._live = {key: job for key, job in self._live.items() if not job.is_finished}

    def _fail(self, error: Exception) -> None:
        message = f"The engine failed: {type(error).__name__}: {error}"
        with self._lock:
            self._failure = message
            while not self._inbox.empty():
                kind, jobs = self._inbox.get()
                if kind == "add":
                    self._live.update((id(job), job) for job in jobs)

        for job in self._live.values():
            if not job.is_finished:
                job.fail(message)
        self._live.clear()

"""The seam that every engine fills: submit sequences, abort them, close; knows no model.

Engines run in the background; a sequence's listener is called from the engine's thread.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod

from midlogit.errors import EngineFailure
from midlogit.sampling.sequence import Sequence


class Engine(ABC):
    """Runs sequences to their end."""

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


class SteppingEngine(Engine):
    """An engine that advances all its sequences by one token a step, in a thread of its own.

    A subclass gives `step`, `place` and `remove`. If `step` raises, every live sequence ends with
    finish_reason "error" and what it had, and the engine takes no more.
    """

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[tuple[str, list[Sequence]]] = queue.SimpleQueue()
        self._live: dict[int, Sequence] = {}
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="midlogit-engine", daemon=True)
        self._thread.start()

    @abstractmethod
    def step(self) -> None:
        """Draws one token for every sequence that is running, starting waiting ones where there is room."""

    @abstractmethod
    def place(self, sequence: Sequence) -> None:
        """Takes a new sequence into the waiting line."""

    @abstractmethod
    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, waiting or running."""

    def submit(self, sequence: Sequence) -> None:
        with self._lock:
            if self._failure is not None:
                raise EngineFailure(self._failure, "Open the pair again.")
            self._inbox.put(("submit", [sequence]))

    def abort(self, sequences: list[Sequence]) -> None:
        self._inbox.put(("abort", sequences))

    def close(self) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = "The engine is closed."
                self._inbox.put(("close", []))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_messages():
                self.step()
                self._forget_finished()
        except Exception as error:  # the engine's own boundary: everyone who waits must hear of it
            self._fail(error)

    def _take_messages(self) -> bool:
        """Handles what came in, waiting for something when idle; False once closed."""
        while True:
            try:
                kind, sequences = self._inbox.get(block=not self._live)
            except queue.Empty:
                return True
            if kind == "close":
                self._end_all("abort")
                return False
            for sequence in sequences:
                if kind == "submit":
                    self._live[id(sequence)] = sequence
                    self.place(sequence)
                elif id(sequence) in self._live:
                    self.remove(self._live.pop(id(sequence)))
                    sequence.end("abort")

    def _forget_finished(self) -> None:
        self._live = {key: sequence for key, sequence in self._live.items() if not sequence.is_finished}

    def _fail(self, error: Exception) -> None:
        message = f"The engine failed: {type(error).__name__}: {error}"
        with self._lock:
            self._failure = message
            while not self._inbox.empty():
                kind, sequences = self._inbox.get()
                if kind == "submit":
                    self._live.update((id(sequence), sequence) for sequence in sequences)
        self._end_all("error", message)

    def _end_all(self, reason: str, error: str | None = None) -> None:
        for sequence in self._live.values():
            if not sequence.is_finished:
                sequence.end("error" if reason == "error" else "abort", error=error)
        self._live.clear()

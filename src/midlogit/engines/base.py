"""The seam that every engine fills: submit sequences, abort them, close; knows no model.

Engines run in the background; a sequence's listener is called from the engine's thread.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from typing import Any

from midlogit.engines.draft_length import DraftLength
from midlogit.errors import EngineFailure, InvalidRequest
from midlogit.requests.scoring import Scored
from midlogit.requests.sequence import Sequence


class Engine(ABC):
    """Runs sequences to their end.

    Attributes:
        draft_length: how many tokens are drafted ahead, and how they fared.
    """

    def __init__(self, draft_length: DraftLength) -> None:
        self.draft_length = draft_length

    @abstractmethod
    def submit(self, sequence: Sequence) -> None:
        """Takes a sequence; it begins when there is room for it.

        Raises:
            EngineFailure: the engine is closed or has failed.
        """

    @abstractmethod
    def abort(self, sequences: list[Sequence]) -> None:
        """Ends those of the sequences that still run, with finish_reason "abort"."""

    def score(self, scored: list[Scored]) -> None:
        """Takes texts to score; each hears of its scores.

        Raises:
            InvalidRequest: this engine cannot score given text.
            EngineFailure: the engine is closed or has failed.
        """
        raise InvalidRequest("This engine cannot score given text.", "Pair.local can.")

    def forget(self, scored: list[Scored]) -> None:
        """Drops those of the texts that still wait to be scored; their listeners hear nothing.

        Raises:
            InvalidRequest: this engine cannot score given text.
        """
        raise InvalidRequest("This engine cannot score given text.", "Pair.local can.")

    @abstractmethod
    def close(self) -> None:
        """Aborts what runs and frees the models; may be called twice."""


class SteppingEngine(Engine):
    """An engine that advances all its sequences together, step by step, in a thread of its own.

    A subclass gives `step`, `place`, `remove` and `score_some`. If `step` raises, every live sequence ends with
    finish_reason "error" and what it had, and the engine takes no more.
    """

    def __init__(self, draft_length: DraftLength) -> None:
        super().__init__(draft_length)
        self._inbox: queue.SimpleQueue[tuple[str, list[Any]]] = queue.SimpleQueue()
        self._live: dict[int, Sequence] = {}
        self._unscored: deque[Scored] = deque()
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="midlogit-engine", daemon=True)
        self._thread.start()

    @abstractmethod
    def step(self) -> None:
        """Draws for every sequence that is running, starting waiting ones where there is room."""

    @abstractmethod
    def place(self, sequence: Sequence) -> None:
        """Takes a new sequence into the waiting line."""

    @abstractmethod
    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, waiting or running."""

    @abstractmethod
    def score_some(self, unscored: deque[Scored]) -> None:
        """Scores as many texts as fit into one step and takes them from the left of the line."""

    def submit(self, sequence: Sequence) -> None:
        self._put("submit", [sequence])

    def score(self, scored: list[Scored]) -> None:
        self._put("score", scored)

    def abort(self, sequences: list[Sequence]) -> None:
        self._inbox.put(("abort", sequences))

    def forget(self, scored: list[Scored]) -> None:
        self._inbox.put(("forget", scored))

    def close(self) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = "The engine is closed."
                self._inbox.put(("close", []))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _put(self, kind: str, work: list[Any]) -> None:
        with self._lock:
            if self._failure is not None:
                raise EngineFailure(self._failure, "Open the pair again.")
            self._inbox.put((kind, work))

    def _run(self) -> None:
        try:
            while self._take_messages():
                if self._unscored:
                    self.score_some(self._unscored)
                if self._live:
                    self.step()
                    self._forget_finished()
        except Exception as error:  # the engine's own boundary: everyone who waits must hear of it
            self._fail(error)

    def _take_messages(self) -> bool:
        """Handles what came in, waiting for something when idle; False once closed."""
        while True:
            try:
                kind, work = self._inbox.get(block=not self._live and not self._unscored)
            except queue.Empty:
                return True
            if kind == "close":
                self._end_all("abort")
                return False
            self._take(kind, work)

    def _take(self, kind: str, work: list[Any]) -> None:
        if kind == "score":
            self._unscored.extend(work)
        elif kind == "forget":
            self._unscored = deque(scored for scored in self._unscored if scored not in work)
        for sequence in work if kind in ("submit", "abort") else ():
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
                kind, work = self._inbox.get()
                if kind == "submit":
                    self._live.update((id(sequence), sequence) for sequence in work)
                elif kind == "score":
                    self._unscored.extend(work)
        self._end_all("error", message)

    def _end_all(self, reason: str, error: str | None = None) -> None:
        for sequence in self._live.values():
            if not sequence.is_finished:
                sequence.end("error" if reason == "error" else "abort", error=error)
        self._live.clear()
        for scored in self._unscored:
            if not scored.is_finished:
                scored.end(error or "The engine was closed.")
        self._unscored.clear()

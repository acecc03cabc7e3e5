"""An engine that advances all its jobs together in a thread of its own; knows the order of steps, calls and pauses.

Knows no model: a subclass says what a step is, and how the base gets new weights between two of them.
"""

from __future__ import annotations

import atexit
import gc
import os
import queue
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from midlogit.engines.base import Engine, Pausing, Running, Updating, Weights
from midlogit.engines.draft_length import DraftLength
from midlogit.errors import EngineFailure


class Job(Protocol):
    """Work of a stepping engine: a sequence to sample, or a text to score."""

    @property
    def is_finished(self) -> bool: ...

    def abort(self) -> None:
        """Ends the job because nobody wants it any more."""

    def fail(self, message: str) -> None:
        """Ends the job with an error of the engine."""


# New objects before a garbage collection. At Python's own 700, three collections per step look through 256 sequences'
# objects, most of which are gone by its end: 0.8 ms, and 0.1 ms at this number.
GC_THRESHOLD = 20_000
USUAL_THRESHOLDS = gc.get_threshold()


def freeze_heap() -> None:
    """Keeps what is loaded out of later garbage collections, and has fewer of them, until an engine is closed.

    Looking through a model's libraries takes tenths of a second, for which every running sequence would wait.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def unfreeze_heap() -> None:
    """Lets garbage collections look at everything again: a model in a cycle of references would never be freed."""
    gc.unfreeze()
    gc.set_threshold(*USUAL_THRESHOLDS)


# Of a pair that is not closed; libraries print what is never collected.
atexit.register(gc.unfreeze)

_stuck: list[threading.Thread] = []  # of engines that wait for what will never come


@atexit.register
def _leave_stuck_threads() -> None:
    """Ends the process with status 1, as failed, if an engine is stuck.

    Its thread waits inside CUDA for a rank that has ended, and the usual end of the process would wait for CUDA.
    """
    if any(thread.is_alive() for thread in _stuck):
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # a reader may have gone
            os._exit(1)


J = TypeVar("J", bound=Job)
T = TypeVar("T")


class SteppingEngine(Engine, Updating, Generic[J]):
    """An engine that advances all its jobs together, step by step, in a thread of its own.

    A subclass gives `step`, `add`, `remove` and what new weights need, and whoever opens it calls `start` once it is
    built. If `step` raises, every live job ends with the error and what it had, and the engine takes no more.
    """

    def __init__(self, draft_length: DraftLength, max_num_seqs: int) -> None:
        super().__init__(draft_length, max_num_seqs)
        self._inbox: queue.SimpleQueue[tuple[str, list[Any]]] = queue.SimpleQueue()
        self._live: dict[int, J] = {}
        self._held: dict[int, J] = {}  # live jobs that came during a pause
        self._is_paused = False
        self._draining: list[Future[None]] = []  # pauses that wait for what runs
        self._is_half_loaded = False  # whether the base has some tensors of an update, not all
        self._ended: str | None = None  # why the engine takes no more
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

    @abstractmethod
    def begun(self) -> list[J]:
        """Jobs of which the base has computed something."""

    @abstractmethod
    def check_weights(self, weights: Weights | None) -> Any:
        """Checks new weights in full; may run in any thread, beside steps.

        Returns:
            What `load_weights` takes.

        Raises:
            WeightMismatch: they do not fit.
        """

    @abstractmethod
    def load_weights(self, checked: Any) -> None:
        """Replaces the base's weights, between two steps."""

    @abstractmethod
    def settle(self) -> None:
        """Finishes what a step has left on the device, so that no row of the old weights draws a later token."""

    @abstractmethod
    def recompute(self) -> None:
        """Computes again, under the new weights, all that the base holds of jobs that have begun."""

    @abstractmethod
    def forget_prefixes(self) -> None:
        """Keeps later jobs from what the base has cached under older weights."""

    def start(self) -> None:
        """Starts the engine's thread."""
        freeze_heap()
        self._thread.start()

    @property
    def num_live(self) -> int:
        """Jobs that wait or run."""
        return len(self._live)

    def update_base(
        self,
        weights: Weights | None,
        *,
        version: int | str | None = None,
        running: Running = "recompute",
    ) -> None:
        checked = self.check_weights(weights)
        self.between_steps(partial(self._replace_base, checked, version, running))

    def pause(self, running: Pausing) -> None:
        drained: Future[None] = Future()
        self.between_steps(partial(self._pause, running, drained))
        _wait_for(drained)

    def resume(self) -> None:
        self.between_steps(self._resume)

    def between_steps(self, call: Callable[[], T]) -> T:
        """Runs a call in the engine's thread, between two steps, and returns what it returns; raises what it raises.

        Raises:
            EngineFailure: the engine is closed or has failed.
        """
        done: Future[T] = Future()
        self._put("call", [(call, done)])
        return _wait_for(done)

    def close(self) -> None:
        with self._lock:
            if self._ended is None:
                self._ended = "The engine is closed."
                self._inbox.put(("close", []))

        if threading.current_thread() is not self._thread:
            while self._thread.is_alive() and not self.is_stuck:
                self._thread.join(timeout=0.1)
        unfreeze_heap()

    def end(self, error: BaseException, patience: float) -> None:
        """Ends the engine with an error of something that its steps need.

        Args:
            patience: seconds that the step under way may go on; it may wait for what will never come.
        """
        self._inbox.put(("fail", [error]))
        self._thread.join(patience)
        if self._thread.is_alive():
            _stuck.append(self._thread)
            self._fail(error)

    def _take(self, jobs: list[J]) -> None:
        """Hands new jobs to the engine's thread.

        Raises:
            EngineFailure: the engine is closed or has failed.
        """
        self._put("add", jobs)

    def _drop(self, jobs: list[J], *, silently: bool = False) -> None:
        """Has the engine's thread remove those of the jobs that still live, and abort them unless `silently`."""
        self._inbox.put(("forget" if silently else "abort", jobs))

    def _put(self, kind: str, content: list[Any]) -> None:
        with self._lock:
            if self._ended is not None:
                raise EngineFailure(self._ended, "Open the pair again.")
            self._inbox.put((kind, content))

    @property
    def is_stuck(self) -> bool:
        """Whether the engine's thread waits for what will never come."""
        return self._thread in _stuck

    @property
    def _can_step(self) -> bool:
        """Whether there is a job to advance, and nothing that forbids it."""
        return (
            len(self._live) > len(self._held)
            and not self._is_half_loaded
            and (not self._is_paused or bool(self._draining))
        )

    def _run(self) -> None:
        try:
            while self._handle_messages():
                if self._can_step:
                    self.step()
                    self._forget_finished()
                    self._end_draining()
        except BaseException as error:  # the thread's end: everyone who waits must hear of it
            self._fail(error)

    def _handle_messages(self) -> bool:
        """Handles all messages, waiting for one when there is nothing to advance; False once closed."""
        while True:
            try:
                kind, content = self._inbox.get(block=not self._can_step)
            except queue.Empty:
                return True

            if kind == "close":
                self._abort(list(self._live.values()))
                self._is_paused = False
                self._end_draining()
                return False
            if kind == "fail":
                raise content[0]
            if kind == "call":
                _answer(*content[0])
            else:
                self._handle(kind, content)
            self._end_draining()

    def _handle(self, kind: str, jobs: list[J]) -> None:
        for job in jobs:
            if kind == "add":
                self._live[id(job)] = job
                if self._is_paused:
                    self._held[id(job)] = job
                else:
                    self.add(job)
            elif id(job) in self._live:
                self._let_go(job)
                if kind == "abort":
                    job.abort()

    def _let_go(self, job: J) -> None:
        del self._live[id(job)]
        if self._held.pop(id(job), None) is None:
            self.remove(job)

    def _abort(self, jobs: list[J]) -> None:
        for job in jobs:
            self._let_go(job)
            job.abort()

    def _forget_finished(self) -> None:
        self._live = {key: job for key, job in self._live.items() if not job.is_finished}

    def _replace_base(self, checked: Any, version: int | str | None, running: Running) -> None:
        """Gives the base new weights; if they cannot be written after all, nothing runs until others can."""
        self.settle()
        self._forget_finished()
        self._is_half_loaded = True
        self.load_weights(checked)
        self._begin_version(version, running)

    def _begin_version(self, version: int | str | None, running: Running) -> None:
        """Does with the jobs that have begun what was asked, now that the weights are new."""
        if running == "abort":
            self._abort(self.begun())
        elif running == "recompute":
            self.recompute()
        self.forget_prefixes()
        self._is_half_loaded = False
        self._count_update(version)

    def _pause(self, running: Pausing, drained: Future[None]) -> None:
        self._is_paused = True
        if running == "wait":
            self._draining.append(drained)  # answered once what runs has ended
            return
        if running == "abort":
            self._abort(list(self._live.values()))
        drained.set_result(None)

    def _resume(self) -> None:
        self._is_paused = False
        for job in self._held.values():
            self.add(job)
        self._held.clear()

    def _end_draining(self) -> None:
        """Answers pauses that wait, once what ran has ended or the pause is over."""
        if self._draining and (not self._is_paused or len(self._live) == len(self._held)):
            for drained in self._draining:
                drained.set_result(None)
            self._draining.clear()

    def _fail(self, error: BaseException) -> None:
        message = f"The engine failed: {type(error).__name__}: {error}"
        with self._lock:
            if self.failure is not None:
                return
            self.failure = self._ended = message
            while not self._inbox.empty():
                kind, content = self._inbox.get()
                if kind == "add":
                    self._live.update((id(job), job) for job in content)
                elif kind == "call":
                    content[0][1].set_exception(EngineFailure(message, "Open the pair again."))

        for drained in self._draining:
            drained.set_exception(EngineFailure(message, "Open the pair again."))
        for job in self._live.values():
            if not job.is_finished:
                with suppress(Exception):  # of a listener: the others must hear of it all the same
                    job.fail(message)
        self._live.clear()


def _answer(call: Callable[[], T], done: Future[T]) -> None:
    """Makes a call of another thread, which waits for its result."""
    try:
        done.set_result(call())
    except BaseException as error:  # it is the caller's
        done.set_exception(error)


def _wait_for(done: Future[T]) -> T:
    """The result of a future; Ctrl-C ends the wait within a tenth of a second."""
    while not done.done():
        wait([done], timeout=0.1)
    return done.result()

"""The class of the actors that work on a job's parts, two at a time on one pair; knows no driver and no pool."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from midlogit.errors import EngineFailure, MidlogitError
from midlogit.jobs import Job, PairSource
from midlogit.jobs.attempts import Attempts
from midlogit.jobs.run_folder import RunFolder
from midlogit.ray.actors import end_actor
from midlogit.ray.pool import CALLS_PER_ACTOR

if TYPE_CHECKING:
    import pyarrow as pa

# Of a part: three with all its items, then one for each item that breaks an engine alone.
MOST_ATTEMPTS = 20


class PartWorker:
    """Works parts on one pair, two at a time; the class of an actor.

    Errors are returned, not raised: those of a constructor would reach the driver only as the text of a traceback.

    Args:
        run: the folder of the job. source: of the pair.
    """

    def __init__(self, run: Path, source: PairSource) -> None:
        self._failure: MidlogitError | None = None
        self._attempts = Attempts(RunFolder(run))
        self._turns = _Turns(CALLS_PER_ACTOR)
        try:
            self._job = Job.open(run)
            self._pair = source.open()
        except MidlogitError as failure:
            self._failure = failure

    def __call__(self, table: pa.Table) -> pa.Table:
        """Works on the part of a table of one row; returns the error that ends the job, or none."""
        import pyarrow as pa

        failure = b""
        try:
            self._work(table.column("part")[0].as_py())
        except MidlogitError as error:
            failure = pickle.dumps(error)
        return pa.table({"failure": [failure]})

    def _work(self, part: int) -> None:
        if self._failure is not None:
            raise self._failure

        # Items of a part that broke engines run alone, so that only the one that breaks another is blamed.
        with self._turns.take(alone=self._attempts.is_isolated(part)):
            try:
                self._job.work(self._pair, part)
            except EngineFailure as failure:
                end_actor(failure, most_attempts=MOST_ATTEMPTS)


class _Turns:
    """Lets so many calls run at once, or one alone."""

    def __init__(self, calls: int) -> None:
        self._calls = calls
        self._free = threading.Semaphore(calls)
        self._entry = threading.Lock()  # one takes several places while nobody else takes any

    @contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        """Waits for the turn of a call, and holds it while the block runs."""
        places = self._calls if alone else 1
        with self._entry:
            for _ in range(places):
                self._free.acquire()
        try:
            yield
        finally:
            self._free.release(places)

"""Works the parts of a job with one pair: submits missing items in a window, journals what ends, commits whole parts.

There is no barrier between parts: while the long completions of one end, the next parts fill their places. Knows what a
part is and when an engine has died; not where parts come from, nor how the pair was opened.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from midlogit.delivery import Batch
from midlogit.errors import EngineFailure, InvalidRequest
from midlogit.jobs.attempts import Attempts
from midlogit.jobs.errors import StorageFailure, TooManyErrors
from midlogit.jobs.manifest import Manifest
from midlogit.jobs.open_part import Item, OpenPart
from midlogit.jobs.run_folder import RunFolder
from midlogit.jobs.schema import Record, error_record, record_of
from midlogit.outputs import Completion
from midlogit.pair import WINDOW, Pair
from midlogit.params import SamplingParams
from midlogit.requests.build import RequestBuilder
from midlogit.requests.sequence import Request

TICK_S = 0.1  # between looks at signals and the clock
PATIENCE_S = 5.0  # for what was aborted to end
BUILDERS = 64  # of requests, kept for rows with the same parameters
RATE_S = 300.0  # over which tokens per second are measured


class PartQueue(Protocol):
    """Where a worker gets its parts from."""

    @property
    def is_over(self) -> bool:
        """Whether it will never have a part again."""

    def next(self) -> int | None:
        """A part to work on now; None when there is none at present."""

    def committed(self, part: int, footer: dict[str, Any]) -> None:
        """Takes note that a part was committed, with the metadata of its results."""

    def left(self, part: int) -> None:
        """Takes note that a part was left unfinished."""


@dataclass(slots=True)
class Progress:
    """What a worker did so far.

    Attributes:
        items, tokens, errors: finished by this worker, errors counted among the items.
        tokens_per_s: over the last RATE_S.
        parts: committed. running: items that run or wait in the engine.
    """

    items: int = 0
    tokens: int = 0
    errors: int = 0
    tokens_per_s: float = 0.0
    parts: int = 0
    running: int = 0


class Rate:
    """Tokens per second over the last RATE_S."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def per_second(self, tokens: int) -> float:
        """The rate, with the total number of tokens now."""
        now = time.monotonic()
        if now - self._points[-1][0] >= 1.0:
            self._points.append((now, tokens))
        while len(self._points) > 2 and now - self._points[1][0] > RATE_S:
            self._points.popleft()
        then, before = self._points[0]
        return (tokens - before) / max(now - then, 1e-9)


class Worker:
    """Works parts until the queue is over, or a signal stops it.

    Args:
        allowed_errors: items that may end as errors before the worker stops.
        on_progress: told of the progress about ten times a second.
        should_stop: asked as often; true ends the work with everything finished kept.
        retry: make the items again that ended as errors.

    Attributes:
        progress: what it did so far.
    """

    def __init__(
        self,
        folder: RunFolder,
        manifest: Manifest,
        pair: Pair,
        queue: PartQueue,
        *,
        allowed_errors: int,
        on_progress: Callable[[Progress], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        retry: bool = False,
    ) -> None:
        self.progress = Progress()
        self._folder = folder
        self._manifest = manifest
        self._reading = manifest.reading
        self._pair = pair
        self._queue = queue
        self._allowed_errors = allowed_errors
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._retry = retry

        self._builder = lru_cache(BUILDERS)(self._new_builder)
        self._attempts = Attempts(folder)
        self._rate = Rate()
        self._open: dict[int, OpenPart] = {}
        self._isolated: deque[int] = deque()  # parts whose items run alone, after all others
        self._is_isolating = False
        self._rows: deque[tuple[OpenPart, int]] = deque()  # whose requests are not made yet
        self._requests: deque[tuple[OpenPart, int, Request]] = deque()  # not submitted yet
        self._running: dict[int, tuple[OpenPart, Item]] = {}  # by the index of the request
        self._num_submitted = 0

    def run(self) -> bool:
        """Works until nothing is left to do.

        Returns:
            Whether it came to the end of the queue; false after `should_stop`.

        Raises:
            EngineFailure: the engine died; what was finished is kept.
            TooManyErrors: more errors than allowed; likewise.
            StorageFailure: the job's folder cannot be written; likewise.
        """
        batch = self._pair.start([])
        try:
            return self._work(batch)
        except EngineFailure as failure:
            self._blame(failure)
            raise
        except OSError as error:
            raise StorageFailure(
                f"Cannot write {self._folder.path}: {error.strerror or error}. What was finished before is kept.",
                "Make room or mend the disk, and run the same command again.",
            ) from error
        finally:
            self._leave(batch)

    def _work(self, batch: Batch) -> bool:
        while not self._should_stop():
            self._fill(batch)
            if not batch.num_running and self._queue.is_over and not self._open:
                return True

            if isinstance(event := batch.poll(TICK_S), Completion):
                self._take(event)
            self._report(batch.num_running)
        return False

    def _fill(self, batch: Batch) -> None:
        """Submits requests until the window is full or there are none, all together: so they share their steps."""
        requests: list[Request] = []
        while batch.num_running + len(requests) < self._window:
            if not self._requests and not self._make_requests():
                if requests or batch.num_running or not self._open_isolated():
                    break
                continue
            part, row, request = self._requests.popleft()
            self._running[self._num_submitted] = part, (row, request.sample)
            requests.append(replace(request, index=self._num_submitted))
            self._num_submitted += 1
        batch.submit(requests)

    @property
    def _window(self) -> int:
        """Most requests that run or wait in the engine."""
        return 1 if self._is_isolating else WINDOW * self._pair.engine.max_num_seqs

    def _make_requests(self) -> bool:
        """Makes the requests of the next row that has missing items; false when there is none at present."""
        while not self._requests:
            if self._rows:
                part, row = self._rows.popleft()
                self._requests += [(part, row, request) for request in self._prepare(part, row)]
            elif self._is_isolating or (number := self._queue.next()) is None:
                return False
            elif self._attempts.is_isolated(number):
                self._isolated.append(number)
            else:
                self._begin(number)
        return True

    def _open_isolated(self) -> bool:
        """Opens a part that killed engines, when nothing else runs; false when there is none."""
        self._is_isolating = bool(self._isolated)
        if self._isolated:
            self._begin(self._isolated.popleft())
        return self._is_isolating

    def _begin(self, number: int) -> None:
        part = OpenPart(self._folder, self._manifest, number, retry=self._retry)
        self._open[number] = part
        self._count_errors(part.num_errors)
        if part.missing:
            self._rows += [(part, row) for row in dict.fromkeys(row for row, _ in part.missing)]
        else:
            self._commit(part)

    def _prepare(self, part: OpenPart, number: int) -> list[Request]:
        """The requests of the missing items of a row; where it cannot be honoured, its items end as errors."""
        row = part.rows[number]
        assert row.prompt is not None
        base_prompt = row.prompt if row.base_prompt is None else row.base_prompt
        is_chat = self._reading.chat or not isinstance(row.prompt, str)
        try:
            builder = self._builder(row.params, is_chat)
        except InvalidRequest as error:
            for item in [item for item in part.missing if item[0] == number]:
                self._fail(part, item, str(error))
            return []

        requests = builder.build(number, base_prompt, row.prompt, row.row_id)
        return [request for request in requests if (number, request.sample) in part.missing]

    def _new_builder(self, params: SamplingParams, is_chat: bool) -> RequestBuilder:
        """Builds the requests of rows with the same parameters; template variables are for chats alone.

        Raises:
            InvalidRequest: parameters that cannot be honoured.
        """
        reading = self._reading
        if not is_chat:
            reading = replace(reading, chat_template_kwargs=None)
        return RequestBuilder(self._pair.mixing, params, reading, strict=False)

    def _take(self, completion: Completion) -> None:
        """Takes a completion; one of a dead engine is not the row's fault.

        Raises:
            EngineFailure: the engine died.
        """
        part, item = self._running[completion.index]
        if completion.error_type == "engine":
            raise EngineFailure(
                str(completion.error), "What was finished is kept: run the same command again."
            )
        del self._running[completion.index]
        if completion.finish_reason == "abort":
            return

        row = part.rows[item[0]]
        if completion.error is not None:
            completion = replace(completion, error=f"{row.where}: {completion.error}")
        self._finish(part, item, record_of(completion, row.params.seed or 0, part.layout))

    def _fail(self, part: OpenPart, item: Item, error: str) -> None:
        """Ends an item that could not begin, or that killed its engine."""
        row = part.rows[item[0]]
        message = f"{row.where}: {error}"
        record = error_record(item[1], row.params.seed or 0, message, part.layout)
        self._finish(part, item, record)

    def _finish(self, part: OpenPart, item: Item, record: Record) -> None:
        part.finish(item, record)
        self.progress.items += 1
        self.progress.tokens += record["completion_tokens"]
        if not part.missing:
            self._commit(part)
        self._count_errors(int(record["error"] is not None))

    def _commit(self, part: OpenPart) -> None:
        footer = part.commit()
        del self._open[part.number]
        self.progress.parts += 1
        self._queue.committed(part.number, footer)

    def _count_errors(self, number: int) -> None:
        self.progress.errors += number
        if self.progress.errors > self._allowed_errors:
            raise TooManyErrors(
                f"{self.progress.errors} completions ended as errors. What was finished is kept.",
                "`midlogit batch status` shows some; allow more by --max-errors.",
            )

    def _blame(self, failure: EngineFailure) -> None:
        """Takes note of which parts were open when the engine died; an item that ran alone becomes an error."""
        if self._is_isolating:
            for part, item in self._running.values():
                with suppress(TooManyErrors):
                    self._fail(part, item, f"The engine died of it alone: {failure.args[0]}")
            self._running.clear()
            return
        for number in {part.number for part, _ in self._running.values()}:
            self._attempts.record(number, str(failure.args[0]))

    def _leave(self, batch: Batch) -> None:
        """Aborts what runs, keeps what ended meanwhile, and gives the parts back."""
        batch.abort()
        deadline = time.monotonic() + PATIENCE_S
        while batch.num_running and time.monotonic() < deadline:
            event = batch.poll(TICK_S)
            if isinstance(event, Completion) and event.finish_reason in ("stop", "length"):
                with suppress(OSError, TooManyErrors):
                    self._take(event)

        for part in self._open.values():
            with suppress(OSError):
                part.leave()
            self._queue.left(part.number)
        self._open.clear()

    def _report(self, running: int) -> None:
        self.progress.running = running
        self.progress.tokens_per_s = self._rate.per_second(self.progress.tokens)
        self._on_progress(self.progress)

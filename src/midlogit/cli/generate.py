"""`midlogit generate`: prompts from arguments, a file or standard input, completions as text or JSON lines.

Knows how far ahead of what is printed rows are read and run. A signal or a prompt that cannot be honoured costs no
other row.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING

from midlogit.cli.console import TICK_S, Signals
from midlogit.cli.inputs import Held, Input, Source, as_they_come, rows_of_arguments
from midlogit.cli.loading import PairOptions, open_pair
from midlogit.cli.printer import Printer
from midlogit.delivery import Event
from midlogit.errors import InvalidRequest, MidlogitError
from midlogit.jobs.inputs import Columns, Row
from midlogit.messages import TemplateOptions
from midlogit.outputs import Completion
from midlogit.pair import WINDOW, Pair
from midlogit.params import SamplingParams
from midlogit.requests.build import RequestBuilder
from midlogit.requests.prompts import Prompt, Reading

if TYPE_CHECKING:
    from tqdm import tqdm

MOST_WAITING = 16  # completions that wait for an earlier row, for each sequence that runs


@dataclass(frozen=True, slots=True)
class Job:
    """The prompts, parameters and output of one call.

    Attributes:
        prompts: of the command line. file, encoding, columns: where and how prompts are read when there are none.
        base_prompt: the base's prompt in place of every prompt.
        strict: whether a prompt that cannot be honoured stops the call before anything runs.
    """

    prompts: list[str]
    file: Path | None
    encoding: str
    columns: Columns
    base_prompt: str | None
    chat: bool
    params: SamplingParams
    stream: bool
    json: bool
    strict: bool
    chat_template_kwargs: TemplateOptions | None = None

    def source(self) -> Source:
        """Where the prompts come from.

        Raises:
            InvalidRequest: options that exclude each other, or an input that cannot be read.
        """
        if self.stream and self.json:
            raise InvalidRequest(
                "--stream and --json exclude each other.",
                "--stream prints text, --json whole completions.",
            )
        if self.stream and self.params.n > 1:
            raise InvalidRequest("--stream shows one completion per prompt.", "Leave out --n.")
        if self.base_prompt is not None and self.columns.base_prompt is not None:
            raise InvalidRequest(
                "--base-prompt and --base-prompt-column exclude each other.", "Leave one out."
            )

        if not self.prompts:
            found = Input(self.file, self.encoding, self.columns)
            return Held(list(found)) if self.strict and not found.can_repeat else found
        if self.file is not None or self.columns.named:
            raise InvalidRequest(
                "There are prompts on the command line and an input to read.", "Leave one out."
            )
        return Held(rows_of_arguments(self.prompts))

    def builder(self, pair: Pair) -> RequestBuilder:
        """Builds the requests of rows."""
        reading = Reading(self.chat, self.chat_template_kwargs)
        return RequestBuilder(pair.mixing, self.params, reading, stream=self.stream, strict=False)

    def prompts_of(self, row: Row) -> tuple[Prompt, Prompt] | None:
        """The prompts of (base, teacher); None where the row cannot be read."""
        if row.error is not None or row.prompt is None:
            return None
        own = row.base_prompt if self.base_prompt is None else self.base_prompt
        return row.prompt if own is None else own, row.prompt


class Feed:
    """Submits rows to a batch while there is room: in the batch, and among what waits to be printed.

    Rows that are in memory anyway are all submitted at once; streamed ones one after the other.

    Attributes:
        is_over: whether no more rows are to come. failure: why reading or running them broke off.
    """

    def __init__(
        self, job: Job, source: Source, rows: Iterator[Row | None], pair: Pair, printer: Printer
    ) -> None:
        self.is_over = False
        self.failure: MidlogitError | None = None
        self.batch = pair.start([])
        self._job, self._rows, self._printer = job, rows, printer
        self._builder = job.builder(pair)
        self._indices = count()

        running = pair.engine.max_num_seqs
        self._most_waiting = math.inf if source.is_held else MOST_WAITING * running
        self._window = math.inf if source.is_held else WINDOW * running
        if job.stream:
            self._window = 1

    def fill(self) -> None:
        """Submits rows that have come, as far as there is room."""
        try:
            while not self.is_over and self._has_room():
                row = next(self._rows)
                if row is None:
                    return
                self._submit(next(self._indices), row)
        except StopIteration:
            self.is_over = True
        except MidlogitError as error:
            self.is_over, self.failure = True, error

    def stop(self) -> None:
        """Submits no more, and aborts what runs."""
        self.is_over = True
        self.batch.abort()

    def _has_room(self) -> bool:
        return (
            self.batch.num_running < self._window and self._printer.num_waiting < self._most_waiting
        )

    def _submit(self, index: int, row: Row) -> None:
        self._printer.expect(index, row.where)
        prompts = self._job.prompts_of(row)
        if prompts is None:
            self._printer.refuse(index, str(row.error))
        else:
            self.batch.submit(self._builder.build(index, *prompts))


def run_generate(job: Job, options: PairOptions) -> int:
    """Runs the job and returns the exit code.

    Raises:
        MidlogitError: the whole call is impossible; or it broke off, and what had begun before is printed.
        OutputLost: output cannot be written.
    """
    from tqdm import tqdm

    source = job.source()
    _require_enough(job, source, lambda row: row.error)
    unread = iter(source)
    first = list(islice(unread, source.num_first))
    printer = Printer(job.params.n, json=job.json, stream=job.stream)
    is_all = source.is_held or len(first) < source.num_first
    if is_all and all(row.error is not None for row in first):
        _print_errors(first, printer)
        return 1

    with Signals() as signals, open_pair(options) as pair:
        builder = job.builder(pair)
        builder.require_chat([p for row in first if (p := job.prompts_of(row)) is not None])
        _require_enough(job, source, lambda row: _error_of(job, builder, row))

        rows = chain(first, unread)
        feed = Feed(job, source, as_they_come(rows) if source.blocks else rows, pair, printer)
        shown = not job.stream and sys.stderr.isatty() and not (is_all and len(first) == 1)
        rows_in_all = source.count() if shown else None
        total = None if rows_in_all is None else rows_in_all * job.params.n
        with (
            signals.noted(),
            tqdm(total=total, disable=not shown, unit="completion", file=sys.stderr) as bar,
        ):
            _deliver(feed, printer, signals, bar)
        if feed.failure is not None:
            raise feed.failure
    return signals.code or int(printer.failed)


def _deliver(feed: Feed, printer: Printer, signals: Signals, bar: tqdm[None]) -> None:
    """Prints completions until all rows have ended.

    A signal aborts what runs, which still yields what it has; a second one ends the wait for that.
    """

    def take(event: Event) -> None:
        printer.add(event)
        bar.update(isinstance(event, Completion))

    stopped = False
    while not (feed.is_over and feed.batch.is_over) and signals.count < 2:
        if signals.count and not stopped:
            feed.stop()
            stopped = True
        feed.fill()
        if (event := feed.batch.poll(TICK_S)) is not None:
            take(event)

    while (event := feed.batch.poll(0)) is not None:
        take(event)
    printer.finish()


def _require_enough(job: Job, source: Source, error_of: Callable[[Row], str | None]) -> None:
    """Refuses rows that cannot be honoured: any in a strict job, else arguments of which none can be.

    Raises:
        InvalidRequest: names the first, and says how many more there are.
    """
    if not (job.strict or job.prompts):
        return

    total, failed, first = 0, 0, ""
    for row in source:
        total += 1
        error = error_of(row)
        if error is not None:
            failed += 1
            first = first or f"{row.where}: {error}"

    if failed and (job.strict or failed == total):
        more = f" {failed - 1} more cannot be honoured." if failed > 1 else ""
        raise InvalidRequest(f"{first}{more}")


def _error_of(job: Job, builder: RequestBuilder, row: Row) -> str | None:
    """Why a row cannot be honoured; None where it can."""
    prompts = job.prompts_of(row)
    return row.error if prompts is None else next(builder.build(0, *prompts)).error


def _print_errors(rows: list[Row], printer: Printer) -> None:
    """Prints rows of which none could be read."""
    for index, row in enumerate(rows):
        printer.expect(index, row.where)
        printer.refuse(index, str(row.error))

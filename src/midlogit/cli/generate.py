"""`midlogit generate`: prompts from arguments, a file or standard input, completions as text or JSON lines.

Knows what is printed where and when: each completion as soon as all before it are printed. A signal or a prompt that
cannot be honoured costs no other row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from midlogit.cli.console import TICK_S, Signals, complain, write_json_line, write_text
from midlogit.cli.inputs import Columns, Row, read_rows, rows_of_arguments
from midlogit.cli.loading import PairOptions, open_pair
from midlogit.delivery import Event
from midlogit.errors import InvalidRequest
from midlogit.messages import TemplateOptions
from midlogit.outputs import Completion, Diagnostics, Token, Usage
from midlogit.pair import Pair
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Prompt, Reading
from midlogit.requests.sequence import Request


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

    def rows(self) -> list[Row]:
        """The prompts.

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
            return read_rows(self.file, self.encoding, self.columns)
        if self.file is not None or self.columns.are_named:
            raise InvalidRequest(
                "There are prompts on the command line and an input to read.", "Leave one out."
            )
        return rows_of_arguments(self.prompts)


def run_generate(job: Job, options: PairOptions) -> int:
    """Runs the job and returns the exit code.

    Raises:
        MidlogitError: the whole call is impossible. OutputLost: output cannot be written.
    """
    from tqdm import tqdm

    rows = job.rows()
    errors = {index: row.error for index, row in enumerate(rows) if row.error is not None}
    _require_enough(job, rows, errors)
    printer = Printer(job, rows)
    if len(errors) == len(rows):
        printer.finish()
        return 1

    with Signals() as signals, open_pair(options) as pair:
        requests = _prepare(pair, job, rows)
        _require_enough(
            job, rows, errors | {r.index: r.error for r in requests if r.error is not None}
        )
        shown = not job.stream and len(requests) > 1 and sys.stderr.isatty()
        with (
            signals.noted(),
            tqdm(total=len(requests), disable=not shown, unit="completion", file=sys.stderr) as bar,
        ):
            for event in _events(pair, requests, job.stream, signals):
                printer.add(event)
                bar.update(isinstance(event, Completion))
            printer.finish()
    return signals.code or int(printer.failed)


def _require_enough(job: Job, rows: list[Row], errors: dict[int, str]) -> None:
    """Refuses rows that cannot be honoured: any in a strict job, else arguments of which none can be.

    Raises:
        InvalidRequest: names the first, and says how many more there are.
    """
    nothing_else = bool(job.prompts) and len(errors) == len(rows)
    if errors and (job.strict or nothing_else):
        first = min(errors)
        more = f" {len(errors) - 1} more cannot be honoured." if len(errors) > 1 else ""
        raise InvalidRequest(f"{rows[first].where}: {errors[first]}{more}")


def _prepare(pair: Pair, job: Job, rows: list[Row]) -> list[Request]:
    """Makes the requests of the rows that were read; `index` is the row's, `error` says why one cannot be honoured."""
    read = [(index, row, row.prompt) for index, row in enumerate(rows) if row.prompt is not None]
    prompts = [prompt for _, _, prompt in read]
    base_prompts: list[Prompt] | None = None
    if job.base_prompt is not None:
        base_prompts = [job.base_prompt] * len(read)
    elif job.columns.base_prompt is not None:
        base_prompts = [
            prompt if row.base_prompt is None else row.base_prompt for _, row, prompt in read
        ]

    reading = Reading(job.chat, job.chat_template_kwargs)
    requests = pair.prepare(
        prompts, job.params, reading, base_prompts=base_prompts, stream=job.stream, strict=False
    )
    return [replace(request, index=read[request.index][0]) for request in requests]


def _events(
    pair: Pair, requests: list[Request], in_turn: bool, signals: Signals
) -> Iterator[Event]:
    """Runs the requests, together or in turn, and yields their events.

    A signal aborts what runs, which still yields what it has; a second one ends the wait for that.
    """
    for batch in ([request] for request in requests) if in_turn else (requests,):
        running, aborted = pair.start(batch), False
        while not running.is_over and signals.count < 2:
            if signals.count and not aborted:
                running.abort()
                aborted = True
            if (event := running.poll(TICK_S)) is not None:
                yield event
        while (event := running.poll(0)) is not None:
            yield event
        if signals.count:
            return


class Printer:
    """Prints completions in the order of the rows, each as soon as all before it are printed; tokens at once.

    Attributes:
        failed: whether a row ended with an error.
    """

    def __init__(self, job: Job, rows: list[Row]) -> None:
        self.failed = False
        self._job = job
        self._rows = rows
        self._last_error = ""
        self._next = (0, 0)
        self._ready = {
            (index, sample): _unreadable(index, sample, row.error)
            for index, row in enumerate(rows)
            if row.error is not None
            for sample in range(job.params.n)
        }

    def add(self, event: Event) -> None:
        self._advance()
        if isinstance(event, Token):
            write_text(event.text)
            return
        self._ready[event.index, event.sample] = event
        self._advance()

    def finish(self) -> None:
        """Prints the completions that wait for one that never came."""
        for key in sorted(self._ready):
            self._print(self._ready[key])
        self._ready.clear()

    def _advance(self) -> None:
        while self._next in self._ready:
            self._print(self._ready.pop(self._next))
            index, sample = self._next
            self._next = (index, sample + 1) if sample + 1 < self._job.params.n else (index + 1, 0)

    def _print(self, completion: Completion) -> None:
        is_error = completion.finish_reason == "error"
        if is_error:
            completion = replace(
                completion, error=f"{self._rows[completion.index].where}: {completion.error}"
            )
            self._print_error(str(completion.error))
        if self._job.json:
            # What was aborted is printed too: it was paid for, and finish_reason says what it is.
            write_json_line(orjson.dumps(completion.to_dict()))
        elif self._job.stream:
            write_text("\n" if completion.token_ids or not is_error else "")
        elif completion.finish_reason != "abort" and (completion.text or not is_error):
            write_text(completion.text + "\n")

    def _print_error(self, error: str) -> None:
        """Prints an error, once for all samples of a row."""
        self.failed = True
        if error != self._last_error:
            complain(error)
        self._last_error = error


def _unreadable(index: int, sample: int, error: str) -> Completion:
    """The completion of a row whose prompt could not be read."""
    return Completion(
        index=index,
        sample=sample,
        prompt=None,
        base_prompt=None,
        text="",
        token_ids=[],
        finish_reason="error",
        stop_reason=None,
        usage=Usage(0, 0, 0, 0),
        diagnostics=Diagnostics(),
        error=error,
        error_type="request",
    )

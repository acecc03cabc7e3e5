"""`midlogit generate`: prompts from arguments or standard input, completions as text or JSON lines.

Knows what is printed where and when; each completion is written as soon as those before it are.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import orjson

from midlogit.cli.loading import InProcess, Serving, Templates, open_pair
from midlogit.errors import InvalidRequest
from midlogit.messages import TemplateOptions
from midlogit.outputs import Completion, Token
from midlogit.pair import Pair
from midlogit.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Job:
    """What one call asks for."""

    prompts: list[str]
    base_prompt: str | None
    chat: bool
    params: SamplingParams
    stream: bool
    json: bool
    chat_template_kwargs: TemplateOptions | None = None

    @property
    def reading(self) -> dict[str, Any]:
        """How the prompts are read, as the methods of `Pair` take it."""
        return {"chat": self.chat, "chat_template_kwargs": self.chat_template_kwargs}


def run_generate(
    job: Job,
    *,
    base: str | None,
    teacher: str | None,
    here: InProcess,
    serving: Serving,
    templates: Templates,
) -> int:
    """Runs the job and returns the exit code."""
    if job.stream and job.json:
        raise InvalidRequest(
            "--stream and --json exclude each other.", "--stream prints text, --json whole completions."
        )
    if job.stream and job.params.n > 1:
        raise InvalidRequest("--stream shows one completion a prompt.", "Leave out --n.")
    prompts = job.prompts or _prompts_from_stdin()
    base_prompts = None if job.base_prompt is None else [job.base_prompt] * len(prompts)
    with open_pair(base, teacher, here=here, serving=serving, templates=templates) as pair:
        if job.stream:
            return _stream(pair, job, prompts)
        return _batch(pair, job, prompts, base_prompts)


def _prompts_from_stdin() -> list[str]:
    if sys.stdin.isatty():
        raise InvalidRequest("There is no prompt.", "Give one, or pipe prompts in, one a line.")
    prompts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise InvalidRequest("Standard input holds no prompt.", "Give one a line.")
    return prompts


def _stream(pair: Pair, job: Job, prompts: list[str]) -> int:
    failed = False
    for prompt in prompts:
        for event in pair.stream(prompt, job.params, base_prompt=job.base_prompt, **job.reading):
            if isinstance(event, Token):
                print(event.text, end="", flush=True)
            else:
                failed |= _report_failure(event)
        print(flush=True)
    return int(failed)


def _batch(pair: Pair, job: Job, prompts: list[str], base_prompts: list[str] | None) -> int:
    from tqdm import tqdm

    batch = pair.as_completed(prompts, job.params, base_prompts=base_prompts, **job.reading)
    printer = OrderedPrinter(job)
    shown = batch.size > 1 and sys.stderr.isatty()
    code = 0
    with tqdm(total=batch.size, disable=not shown, unit="completion", file=sys.stderr) as bar:
        try:
            for completion in batch:
                printer.add(completion)
                bar.update()
        except KeyboardInterrupt:
            for completion in batch.stop():
                printer.add(completion)
            code = 130
    printer.finish()
    return code or int(printer.failed)


class OrderedPrinter:
    """Prints completions in the order of the prompts, each as soon as all before it are printed."""

    def __init__(self, job: Job) -> None:
        self.failed = False
        self._job = job
        self._ready: dict[tuple[int, int], Completion] = {}
        self._next = (0, 0)

    def add(self, completion: Completion) -> None:
        self._ready[completion.index, completion.sample] = completion
        while self._next in self._ready:
            self._print(self._ready.pop(self._next))
            index, sample = self._next
            self._next = (index, sample + 1) if sample + 1 < self._job.params.n else (index + 1, 0)

    def finish(self) -> None:
        """Prints what waits behind a completion that never came."""
        for key in sorted(self._ready):
            self._print(self._ready[key])
        self._ready.clear()

    def _print(self, completion: Completion) -> None:
        self.failed |= _report_failure(completion)
        if self._job.json:
            # What was aborted is printed too: it was paid for, and finish_reason says what it is.
            line = orjson.dumps(completion.to_dict()).decode()
        elif completion.finish_reason == "abort":
            return
        else:
            line = completion.text
        print(line, flush=True)


def _report_failure(completion: Completion) -> bool:
    if completion.finish_reason != "error":
        return False
    print(f"midlogit: {completion.error}", file=sys.stderr)
    return True

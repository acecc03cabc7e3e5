"""The work of `midlogit batch`: plans, runs and reads jobs; knows what is printed, signals and exit codes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import orjson
from tqdm import tqdm

from midlogit.cli.console import Signals, complain, write_json_line, write_text
from midlogit.cli.loading import PairOptions, announce, source_of
from midlogit.errors import InvalidRequest
from midlogit.extras import require
from midlogit.jobs import Job, JobOptions, PairSource, Status, WorkerRole, export
from midlogit.jobs.worker import Progress
from midlogit.pair import Pair

WITH_ERRORS, STOPPED = 4, 75
LINE_S = 30.0  # between lines of progress where there is no terminal
WATCH_S = 2.0


def plan_job(inputs: Sequence[Path], out: Path, options: JobOptions, pair: PairOptions) -> int:
    """Plans a job and says what it is.

    Raises:
        MidlogitError: as `Job.plan`.
    """
    job = Job.plan(inputs, out, source_of(pair), options)
    manifest = job.manifest
    wrong = f", {manifest.error_rows} of which cannot be honoured" if manifest.error_rows else ""
    write_text(
        f"{out}: {manifest.rows:,} rows{wrong}, {manifest.items:,} completions in {manifest.parts:,} parts.\n"
    )
    return 0


@dataclass(frozen=True, slots=True)
class OnRay:
    """The options of a job that runs on Ray.

    Attributes:
        address: None for no Ray. replicas: LO:HI. gpus: of each.
    """

    address: str | None
    replicas: str | None
    gpus: float | None

    def require_usable(self, worker: str | None) -> None:
        """Refuses options that say nothing together, and Ray where it is not installed.

        Raises:
            InvalidRequest: replicas or GPUs without Ray, or Ray with a worker of several. MissingExtra: no Ray.
        """
        if self.address is None and (self.replicas, self.gpus) != (None, None):
            raise InvalidRequest(
                "--replicas and --gpus-per-replica are for Ray.", "Add --ray local."
            )
        if self.address is not None and worker is not None:
            raise InvalidRequest(
                "--ray and --worker exclude each other.", "Ray divides the work among its actors."
            )
        if self.address is not None:
            require("ray.data", "ray")


def run_job(
    inputs: Sequence[Path],
    out: Path,
    options: JobOptions,
    pair: PairOptions,
    worker: str | None,
    on_ray: OnRay,
) -> int:
    """Begins a job or goes on with it.

    Raises:
        MidlogitError: as `Job.plan`, `Job.run` and `run_on_ray`.
    """
    on_ray.require_usable(worker)
    role = WorkerRole.parse(worker)
    source = source_of(pair)
    with Signals() as signals:
        try:
            job = Job.plan(inputs, out, source, options)
            if job.missing() and on_ray.address is not None:
                _work_on_ray(job, source, on_ray, options.max_errors, signals)
            elif job.missing():
                announce(pair)
                with source.open() as opened:
                    _work(job, opened, role, options.max_errors, signals)
        except (KeyboardInterrupt, SystemExit):  # while models load: nothing was lost
            return STOPPED
        with signals.noted():  # a second Ctrl-C does not change what is said about the first
            return _exit_code(job, signals)


def retry_job(run: Path, pair: PairOptions, worker: str | None, max_errors: str) -> int:
    """Makes completions again that ended as errors.

    Raises:
        MidlogitError: as `Job.open` and `Job.run`.
    """
    role = WorkerRole.parse(worker)
    source = source_of(pair)
    job = Job.open(run)
    with Signals() as signals:
        try:
            job.require_same_pair(source)
            if job.parts_with_errors():
                announce(pair)
                with source.open() as opened:
                    _work(job, opened, role, max_errors, signals, retry=True)
        except (KeyboardInterrupt, SystemExit):
            return STOPPED
        with signals.noted():  # a second Ctrl-C does not change what is said about the first
            return _exit_code(job, signals)


def show_status(run: Path, *, watch: bool, json: bool) -> int:
    """Prints the state of a job, again and again with `watch`.

    Raises:
        InvalidRequest: there is no job in the folder.
    """
    job = Job.open(run)
    while True:
        status = job.status()
        if json:
            write_json_line(orjson.dumps(status.to_dict()))
        else:
            write_text(_described(run, status))
        if not watch or status.is_complete:
            return 0
        time.sleep(WATCH_S)


def verify_job(run: Path) -> int:
    """Prints what is wrong with a job's results.

    Raises:
        InvalidRequest: there is no job in the folder.
    """
    job = Job.open(run)
    problems = job.verify()
    for problem in problems:
        write_text(f"{problem}\n")
    if not problems:
        write_text(
            f"{run}: {job.manifest.rows:,} rows, {job.manifest.items:,} completions, each exactly once.\n"
        )
    return int(bool(problems))


def export_job(
    run: Path, to: str, out: Path | None, top_of: str | None, tokenizer: str | None
) -> int:
    """Exports the results of a job and says what was written.

    Raises:
        MidlogitError: as `export`.
    """
    found = export(Job.open(run), to, out, top_of=top_of, tokenizer=tokenizer)
    kept = "marked" if to in ("openai", "jsonl") else "left out"
    errors = f", {found.errors:,} completions with errors {kept}" if found.errors else ""
    write_text(f"{found.path}: {found.rows:,} rows{errors}.\n")
    for note in found.notes:
        complain(note)
    return 0


def _work(
    job: Job,
    pair: Pair,
    role: WorkerRole,
    max_errors: str | int,
    signals: Signals,
    *,
    retry: bool = False,
) -> None:
    with signals.noted(), Display(job, retry=retry) as display:
        job.run(
            pair,
            role=role,
            max_errors=max_errors,
            on_progress=display.show,
            should_stop=lambda: signals.count > 0,
            retry=retry,
        )


def _work_on_ray(
    job: Job, source: PairSource, on_ray: OnRay, max_errors: str | int, signals: Signals
) -> None:
    from midlogit.ray.parts import Replicas, run_on_ray

    replicas = Replicas.parse(on_ray.replicas or "1", on_ray.gpus)
    with signals.noted(), Display(job, retry=False) as display:
        run_on_ray(
            job,
            source,
            replicas,
            address=str(on_ray.address),
            max_errors=max_errors,
            on_progress=display.show,
            should_stop=lambda: signals.count > 0,
        )


class Display:
    """Shows the progress of a worker: a bar on a terminal, elsewhere a line now and then.

    Args:
        retry: the work is what ended as errors.
    """

    def __init__(self, job: Job, *, retry: bool) -> None:
        status = job.status()
        self._before = 0 if retry else status.done
        self._total = status.errors if retry else status.items
        self._tokens_per_item = status.tokens / status.done if status.done else 0.0
        self._next_line = time.monotonic() + LINE_S
        self._bar = tqdm(
            total=self._total,
            initial=self._before,
            disable=not sys.stderr.isatty(),
            unit="completion",
            file=sys.stderr,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, progress: Progress) -> None:
        """Shows what is done now."""
        done = self._before + progress.items
        told = f"{progress.tokens_per_s:,.0f} tokens/s{self._left(progress, done)}"
        if progress.errors:
            told += f", {progress.errors:,} errors"
        if not self._bar.disable:
            self._bar.set_postfix_str(told, refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_S
            complain(f"{done:,} of {self._total:,} completions, {told}")

    def _left(self, progress: Progress, done: int) -> str:
        """The time left at the present rate, if every completion is as long as the mean so far."""
        mean = progress.tokens / progress.items if progress.items else self._tokens_per_item
        if not mean or not progress.tokens_per_s:
            return ""
        return f", about {duration((self._total - done) * mean / progress.tokens_per_s)} left"


def _exit_code(job: Job, signals: Signals) -> int:
    """Says what is done and returns the exit code."""
    status = job.status()
    write_text(_described(job.path, status))
    if not status.is_complete:
        if not signals.count:
            complain("Other workers go on with the rest.")
            return 0
        return STOPPED
    return WITH_ERRORS if status.errors else 0


def _described(run: Path, status: Status) -> str:
    lines = [
        f"{run}: {status.done:,} of {status.items:,} completions, {status.tokens:,} tokens,"
        f" {status.errors:,} errors, {status.parts_done:,} of {status.parts:,} parts."
    ]
    if status.workers:
        left = f", about {duration(status.seconds_left)} left" if status.seconds_left else ""
        lines.append(f"{len(status.workers)} workers: {status.tokens_per_s:,.0f} tokens/s{left}.")
    lines += [f"error: {error}" for error in status.error_examples]
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

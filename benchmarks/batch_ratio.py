"""Tokens per second of `Job.run` over those of `Pair.as_completed`, and where a job spends the difference.

Both sides have the same requests and seeds, in one process on one pair, in both orders.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.batch_jobs import Work
from midlogit.jobs import worker
from midlogit.jobs.journal import Journal
from midlogit.jobs.open_part import OpenPart
from midlogit.pair import Pair

# What a job does on its own thread, by the call that does it.
PARTS: dict[str, tuple[Any, str]] = {
    "open": (OpenPart, "__init__"),
    "prepare": (Pair, "prepare"),
    "record": (worker, "record_of"),
    "journal": (Journal, "append"),
    "commit": (OpenPart, "commit"),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One run: its tokens, its time, the processor's time of all threads and of the thread that waits for results."""

    tokens: int
    seconds: float
    processor_s: float
    thread_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Stopwatch:
    """Measures one run."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time(), time.thread_time()

    def stop(self, tokens: int) -> Run:
        now = time.perf_counter(), time.process_time(), time.thread_time()
        return Run(tokens, *(b - a for a, b in zip(self._start, now, strict=True)))


def run_job(work: Work, pair: Pair, folder: Path) -> tuple[Run, Counter[str]]:
    """Runs a job that was planned before.

    Returns:
        (the run, seconds of each of PARTS).
    """
    job = work.plan(folder, "run")
    with timed_parts() as spent:
        watch = Stopwatch()
        job.run(pair)
        seconds = watch.stop(0)
    found = replace(seconds, tokens=job.status().tokens)
    if problems := job.verify():
        raise RuntimeError(problems[0])
    shutil.rmtree(job.path)
    return found, spent


def run_call(work: Work, pair: Pair) -> Run:
    """Runs the same requests in one call."""
    watch = Stopwatch()
    return watch.stop(sum(c.usage.completion_tokens for c in work.start(pair)))


@contextmanager
def timed_parts() -> Iterator[Counter[str]]:
    """Counts the seconds that are spent in each of PARTS, waits for the interpreter's lock included."""
    spent: Counter[str] = Counter()
    before = {name: getattr(owner, call) for name, (owner, call) in PARTS.items()}

    def timed(name: str, call: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                spent[name] += time.perf_counter() - start

        return run

    for name, (owner, call) in PARTS.items():
        setattr(owner, call, timed(name, before[name]))
    try:
        yield spent
    finally:
        for name, (owner, call) in PARTS.items():
            setattr(owner, call, before[name])


def compare(work: Work, pair: Pair, rounds: int, folder: Path) -> dict[str, Any]:
    """Runs both in turn, the order changing from round to round; a short run of each goes before."""
    brief = replace(work, prompts=work.prompts[: pair.engine.max_num_seqs])
    run_call(brief, pair)
    run_job(brief, pair, folder)

    calls, jobs, spent = [], [], Counter[str]()
    for number in range(rounds):
        for is_job in (number % 2 == 1, number % 2 == 0):
            if is_job:
                run, parts = run_job(work, pair, folder)
                jobs.append(run)
                spent += parts
            else:
                calls.append(run_call(work, pair))
        ratio = jobs[-1].tokens_per_s / calls[-1].tokens_per_s
        print(
            f"round {number}: job {jobs[-1]}, call {calls[-1]}, ratio {ratio:.4f}, {dict(parts)}",
            file=sys.stderr,
            flush=True,
        )

    pairs = list(zip(jobs, calls, strict=True))
    ratios = [job.tokens_per_s / call.tokens_per_s for job, call in pairs]
    tokens = sum(run.tokens for run in jobs)
    return {
        "max_num_seqs": pair.engine.max_num_seqs,
        "completions": len(work.prompts) * work.params.n,
        "tokens": jobs[0].tokens,
        "job_tokens_per_s": median(run.tokens_per_s for run in jobs),
        "call_tokens_per_s": median(run.tokens_per_s for run in calls),
        "ratio": median(ratios),
        "ratio_of_each_round": ratios,
        "processor_ratio": median(
            call.processor_s / call.tokens * job.tokens / job.processor_s for job, call in pairs
        ),
        "job_thread_us_per_token": 1e6 * sum(run.thread_s for run in jobs) / tokens,
        "call_thread_us_per_token": 1e6
        * sum(run.thread_s for run in calls)
        / sum(run.tokens for run in calls),
        "parts_us_per_token": {name: 1e6 * spent[name] / tokens for name in PARTS},
    }

"""Workers with a GPU each on one job, against one worker alone: tokens per second until the last part is committed.

    python -m benchmarks.batch_workers WORK       opens the pair of a pickled Work, then runs the jobs that stdin names;
                                                  the benchmark runs it as a process for each GPU

All workers have opened their pair and run a first batch before any time begins. Each has one part of the same size.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Self

from benchmarks.batch_jobs import Work, id_prompts
from midlogit.jobs import Job, WorkerRole
from midlogit.jobs.worker import Progress
from midlogit.pair import Pair

ANSWER = "RESULT"


class WorkerProcess:
    """A worker in a process of its own, with one GPU.

    Args:
        work: a file with the pickled Work.
    """

    def __init__(self, work: Path, gpu: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.batch_workers", str(work)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, run: Path, role: str) -> None:
        """Begins a job, in a role such as "0/2"."""
        assert self._process.stdin is not None
        print(json.dumps([str(run), role]), file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """What it says next; waits for it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return found
        raise RuntimeError(f"A worker ended with code {self._process.wait()}.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def measure_workers(work: Work, count: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Runs one worker alone and all together in turn, the order changing from round to round.

    Args:
        work: of one worker; together they have as many times the rows.
    """
    rows = len(work.prompts)
    pickled = folder / "work.pickle"
    pickled.write_bytes(pickle.dumps(work))

    alone, together = [], []
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(pickled, gpu)) for gpu in range(count)]
        for worker in workers:
            worker.answer()
        for number in range(rounds):
            for is_alone in (number % 2 == 0, number % 2 == 1):
                working = [workers[number % count]] if is_alone else workers
                prompts = more_prompts(work, rows * len(working))
                share = replace(work, prompts=prompts, rows_per_part=rows)
                job = share.plan(folder, f"run-{number}-{len(working)}")
                found = run_together(job, working)
                (alone if is_alone else together).append(found)
                print(
                    f"round {number}: {len(working)} workers {found}", file=sys.stderr, flush=True
                )

    speedups = [
        many["tokens_per_s"] / one["tokens_per_s"]
        for many, one in zip(together, alone, strict=True)
    ]
    return [
        {
            "workers": count,
            "rows_per_worker": rows,
            "one_tokens_per_s": median(found["tokens_per_s"] for found in alone),
            "all_tokens_per_s": median(found["tokens_per_s"] for found in together),
            "speedup": median(speedups),
            "speedup_of_each_round": speedups,
        }
    ]


def more_prompts(work: Work, rows: int) -> list[list[int]]:
    """Prompts like those of the work, all different."""
    ids = 1 + max(max(prompt) for prompt in work.prompts)
    return id_prompts(rows, len(work.prompts[0]), ids)


def run_together(job: Job, workers: list[WorkerProcess]) -> dict[str, Any]:
    """Has workers run a job; the time is from the first start to the last commit."""
    for number, worker in enumerate(workers):
        worker.tell(job.path, f"{number}/{len(workers)}")
    answers = [worker.answer() for worker in workers]
    if problems := job.verify():
        raise RuntimeError(problems[0])

    tokens = sum(answer["tokens"] for answer in answers)
    seconds = max(a["committed"] for a in answers) - min(a["started"] for a in answers)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "tokens_of_each": [answer["tokens"] for answer in answers],
    }


def run_one(pair: Pair, run: str, role: str) -> dict[str, Any]:
    """Runs a job in this process; times are of the system's monotonic clock, which all processes share."""
    found = {"tokens": 0, "parts": 0, "started": time.monotonic(), "committed": 0.0}

    def note(progress: Progress) -> None:
        if progress.parts > found["parts"]:
            found.update(parts=progress.parts, committed=time.monotonic())
        found["tokens"] = progress.tokens

    Job.open(run).run(pair, role=WorkerRole.parse(role), on_progress=note)
    return found


def main() -> None:
    work: Work = pickle.loads(Path(sys.argv[1]).read_bytes())
    with work.source.open() as pair:
        brief = replace(work, prompts=work.prompts[: pair.engine.max_num_seqs])
        for _ in brief.start(pair):
            pass
        print(ANSWER + "{}", flush=True)
        for line in sys.stdin:
            print(ANSWER + json.dumps(run_one(pair, *json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

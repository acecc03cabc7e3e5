"""The coordinator of a job alone: peak memory and rows per second with an engine that ends every sequence at once.

python -m benchmarks.batch_memory RUN ROWS TOKENS         plans and runs one job; the benchmark runs it as a process
python -m benchmarks.batch_memory RUN status              reads and verifies it, likewise
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.batch_jobs import Work, bundled_source, openings
from midlogit import SamplingParams
from midlogit.engines.base import Engine
from midlogit.engines.draft_length import DraftLength
from midlogit.jobs import Job
from midlogit.outputs import Decision
from midlogit.pair import Pair
from midlogit.requests.sequence import Sequence

# (rows, tokens of each completion)
SIZES = ((1_000, 4), (10_000, 512), (100_000, 4))
SEQUENCES = 256
DECISION = Decision(
    token_id=17,
    alpha=0.5,
    kl_base=0.11,
    kl_teacher=0.11,
    entropy=1.3,
    ess_base=3.1,
    ess_teacher=2.7,
    logprob=-0.7,
    base_logprob=-1.1,
    teacher_logprob=-0.9,
    base_tempered_logprob=-1.1,
    teacher_tempered_logprob=-0.9,
    base_support_logprob=-1.1,
    teacher_support_logprob=-0.8,
    base_support_logmass=-0.1,
    teacher_support_logmass=-0.05,
    forced=False,
    fallback=False,
    constrained=True,
)


class FakeEngine(Engine):
    """Ends every sequence when it is submitted, with one decision over and over."""

    def __init__(self) -> None:
        super().__init__(DraftLength("off", (0,)), SEQUENCES)

    def submit(self, sequence: Sequence) -> None:
        while not sequence.is_finished:
            sequence.append(DECISION)

    def abort(self, sequences: list[Sequence]) -> None:
        pass

    def close(self) -> None:
        pass


def peak_mb() -> float:
    """The peak of this process's resident memory, in 10⁶ bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def plan_and_run(run: Path, rows: int, tokens: int) -> dict[str, float]:
    """Plans and runs a job in this process, as `midlogit batch run` does."""
    source = bundled_source("local", SEQUENCES)
    params = SamplingParams.preset("balanced", max_tokens=tokens, seed=1, ignore_eos=True)
    work = Work(source, openings(rows), params, chat=False)
    started_mb = peak_mb()
    with source.mixing():  # imports take as long as the plan of a hundred thousand rows
        pass

    start = time.perf_counter()
    job = work.plan(run.parent, run.name)
    planned = time.perf_counter()
    planned_mb = peak_mb()
    with source.mixing() as mixing, Pair(mixing, FakeEngine()) as pair:
        if not job.run(pair):
            raise RuntimeError("The job is not complete.")
    end = time.perf_counter()
    return {
        "before_mb": started_mb,
        "plan_mb": planned_mb,
        "peak_mb": peak_mb(),
        "plan_rows_per_s": rows / (planned - start),
        "run_rows_per_s": rows / (end - planned),
    }


def read_back(run: Path) -> dict[str, float]:
    """Reads the status of a complete job and verifies it, in this process."""
    start = time.perf_counter()
    job = Job.open(run)
    status = job.status()
    told = time.perf_counter()
    if problems := job.verify():
        raise RuntimeError(problems[0])
    end = time.perf_counter()
    return {
        "status_rows_per_s": status.items / (told - start),
        "verify_rows_per_s": status.items / (end - told),
        "read_peak_mb": peak_mb(),
    }


def measure_memory() -> list[dict[str, Any]]:
    """Figures of each of SIZES, each in processes of its own."""
    found = []
    for rows, tokens in SIZES:
        with tempfile.TemporaryDirectory() as scratch:
            run = f"{scratch}/run"
            figures = {**_child(run, str(rows), str(tokens)), **_child(run, "status")}
            figures["run_mb"] = (
                sum(f.stat().st_size for f in Path(run).rglob("*") if f.is_file()) / 1e6
            )
        found.append({"rows": rows, "tokens_per_completion": tokens, **figures})
        print(found[-1], file=sys.stderr, flush=True)

    (small, few), (large, many) = ((row["peak_mb"], row["rows"]) for row in found[-2:])
    found[-1]["growth_bytes_per_row"] = 1e6 * (large - small) / (many - few)
    return found


def _child(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.batch_memory", *arguments]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(answer.splitlines()[-1])
    return figures


def main() -> None:
    run, *numbers = sys.argv[1:]
    if numbers == ["status"]:
        print(json.dumps(read_back(Path(run))))
    else:
        print(json.dumps(plan_and_run(Path(run), *map(int, numbers))))


if __name__ == "__main__":
    main()

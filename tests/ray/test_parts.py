"""`midlogit batch run --ray` as a user runs it, with actors and drivers that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from midlogit import Pair, SamplingParams
from midlogit.jobs import Job, JobOptions, PairSource
from midlogit.ray.parts import Replicas, run_on_ray
from midlogit.requests.prompts import Reading
from tests.questions import QUESTIONS

ROWS = [{"id": f"row {n}", "prompt": f"{QUESTIONS[n % 16]} {n}"} for n in range(48)]
LOCAL = PairSource("local", options={"device": "cpu", "dtype": "float32", "max_num_seqs": 4})
OPTIONS = JobOptions(
    SamplingParams(n=2, max_tokens=48, seed=3), Reading(chat=True), rows_per_part=6
)
COMMAND = [
    *(sys.executable, "-m", "midlogit", "batch", "run", "rows.jsonl", "--out", "RUN", "--chat"),
    *("--n", "2", "--max-tokens", "48", "--seed", "3", "--rows-per-part", "6", "--device", "cpu"),
    *("--dtype", "float32", "--max-num-seqs", "4", "--ray", "local", "--replicas", "2"),
]
PATIENCE_S = 300


def write_rows(folder: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    return path


def results(job: Job) -> list[tuple[Any, ...]]:
    """(row id, sample, token ids, text) in the order of the files."""
    columns = ("row_id", "sample", "token_ids", "text")
    return [
        tuple(row[name] for name in columns) for table in job.tables() for row in table.to_pylist()
    ]


def wait_for(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def actors_of(driver: int) -> list[int]:
    """The processes of the pool's actors, which descend from the driver through its raylet."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[pid] = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue

    def descends(pid: int) -> bool:
        while pid > 1 and pid != driver:
            pid = parents.get(pid, 0)
        return pid == driver

    return [pid for pid, name in names.items() if "PartWorker" in name and descends(pid)]


def finished_lines(run: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in run.glob("journal/*.jsonl"))


def parts_done(run: Path) -> int:
    return len(list(run.glob("data/*.parquet")))


def test_killed_actor_stopped_driver_killed_driver(pair: Pair, tmp_path: Path) -> None:
    """SIGTERM exits with 75, -9 of a driver and of an actor lose nothing: the same line ends the job."""
    write_rows(tmp_path)
    run = tmp_path / "RUN"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            COMMAND, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    stopped = start()
    wait_for(lambda: parts_done(run) or finished_lines(run))
    stopped.send_signal(signal.SIGTERM)
    output, errors = stopped.communicate(timeout=PATIENCE_S)
    assert stopped.returncode == 75, errors
    assert "of 96 completions" in output and "Traceback" not in errors

    killed = start()
    done = parts_done(run)
    wait_for(lambda: parts_done(run) > done)
    killed.kill()
    killed.communicate()
    assert Job.open(run).missing()

    last = start()
    victim = wait_for(lambda: len(found := actors_of(last.pid)) == 2 and found[0])
    os.kill(victim, signal.SIGKILL)
    output, errors = last.communicate(timeout=PATIENCE_S)
    assert last.returncode == 0, errors
    assert "96 of 96 completions" in output

    job = Job.open(run)
    assert job.verify() == []
    whole = Job.plan([tmp_path / "rows.jsonl"], tmp_path / "WHOLE", LOCAL, OPTIONS)
    assert whole.run(pair)
    assert results(job) == results(whole)


@dataclass(frozen=True)
class Poisoned(PairSource):
    """Opens a pair whose engine dies of a certain prompt."""

    def open(self) -> Pair:
        pair = super().open()
        engine: Any = pair.engine
        step = engine.step

        def poisoned() -> None:
            if any("poison" in s.request.prompt for s in [*engine._waiting, *engine._running]):
                raise RuntimeError("no such kernel")
            step()

        engine.step = poisoned
        return pair


def test_a_row_that_kills_engines_is_the_only_error(pair: Pair, tmp_path: Path) -> None:
    rows = [*ROWS[:11], {"id": "bad", "prompt": "poison"}]
    options = JobOptions(SamplingParams(max_tokens=8, seed=3), rows_per_part=6)
    job = Job.plan([write_rows(tmp_path, rows)], tmp_path / "RUN", LOCAL, options)
    source = Poisoned(LOCAL.engine, options=LOCAL.options)
    assert run_on_ray(job, source, Replicas(), max_errors=1)
    assert job.verify() == []

    texts = pair.generate(
        [row["prompt"] for row in rows[:11]],
        options.params,
        request_ids=[row["id"] for row in rows[:11]],
    )
    rows_of_job = [row for table in job.tables() for row in table.to_pylist()]
    assert [row["token_ids"] for row in rows_of_job[:11]] == [c.token_ids for c in texts]
    assert "died of it alone" in rows_of_job[11]["error"]


def test_models_that_are_not_there(tmp_path: Path) -> None:
    """The pair of an actor that cannot be opened ends the job with its own error, in one line."""
    write_rows(tmp_path)
    Job.plan([tmp_path / "rows.jsonl"], tmp_path / "RUN", LOCAL, OPTIONS)
    command = [*COMMAND, "--device", "cuda:7"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.returncode == 2
    assert "Device 'cuda:7' cannot be used" in run.stderr and "Traceback" not in run.stderr

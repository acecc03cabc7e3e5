"""`midlogit batch` as it is typed: what it prints, exit codes, and what it refuses before anything is lost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from midlogit import KLBudget, Pair
from midlogit.cli import main
from midlogit.jobs import Job, PairSource
from midlogit.jobs.claims import Presence
from midlogit.jobs.manifest import SCHEMA_VERSION
from midlogit.jobs.run_folder import RunFolder
from tests.records import tempered

Command = Callable[..., tuple[int, str, str]]
SHORT = ("--max-tokens", "4", "--rows-per-part", "4")


@pytest.fixture
def batch(
    pair: Pair,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[Command]:
    """`midlogit batch` in this process and in `tmp_path`, with the pair that is open: exit code, stdout, stderr."""

    @contextlib.contextmanager
    def opened(_: PairSource) -> Iterator[Pair]:
        yield pair

    monkeypatch.setattr(PairSource, "open", opened)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["midlogit", "batch", *map(str, arguments)])
        monkeypatch.setattr(
            sys, "stdout", io.TextIOWrapper(io.FileIO(1, "wb", closefd=False), "utf-8")
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(SystemExit) as ended:
            main.run()  # ends with SIGINT ignored, as it stays for a signal that comes late
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out, said.err

    yield call
    signal.signal(signal.SIGINT, signal.default_int_handler)


def write_lines(name: str, *rows: object) -> Path:
    path = Path(name)
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return path


def ten_rows(name: str = "in.jsonl") -> Path:
    return write_lines(name, *({"id": f"r{n}", "prompt": f"The fox {n}"} for n in range(10)))


def test_a_job_from_plan_to_verify(batch: Command) -> None:
    ten_rows()
    line = ("in.jsonl", "--out", "RUN", "--n", 2, *SHORT)
    assert batch("plan", *line)[:2] == (0, "RUN: 10 rows, 20 completions in 3 parts.\n")
    assert batch("status", "RUN")[1].startswith("RUN: 0 of 20 completions, 0 tokens")
    code, out, _ = batch("verify", "RUN")
    assert code == 1 and "3 of 3 parts are not done" in out

    code, out, errors = batch("run", *line)
    assert (code, errors) == (0, "") and "20 of 20 completions, 80 tokens, 0 errors" in out
    assert batch("run", *line)[0] == 0  # nothing is left to do
    assert batch("run", "--out", "RUN", "--n", 2, *SHORT)[0] == 0  # the input may be gone
    said = json.loads(batch("status", "RUN", "--json", "--watch")[1])
    assert (said["done"], said["errors"], said["is_complete"]) == (20, 0, True)
    assert batch("verify", "RUN")[:2] == (0, "RUN: 10 rows, 20 completions, each exactly once.\n")

    part = Path("RUN/data/part-00001.parquet")
    data = bytearray(part.read_bytes())
    data[len(data) // 10] ^= 1
    part.write_bytes(data)
    code, out, _ = batch("verify", "RUN")
    assert code == 1 and "part-00001 cannot be read" in out


def test_readers_read_a_job_that_still_runs(
    batch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import duckdb
    import pandas
    import polars

    ten_rows()
    batch("run", "in.jsonl", "--out", "RUN", *SHORT)
    Path("RUN/data/part-00001.parquet").unlink()
    Path("RUN/tmp/part-00001.parquet.half").write_bytes(b"PAR1")
    frame = pandas.read_parquet("RUN/data")
    assert len(frame) == 6 and len(frame["alpha"][0]) == 4
    loaded = datasets.load_dataset(
        "parquet", data_files="RUN/data/*.parquet", cache_dir="cache", split="train"
    )
    assert loaded["row_id"] == frame["row_id"].tolist()
    card = datasets.load_dataset("RUN", cache_dir="cache", split="train")
    assert card.num_rows == 6 and card.column_names == loaded.column_names
    assert polars.read_parquet("RUN/data/*.parquet")["row_id"].to_list() == loaded["row_id"]
    rows = duckdb.sql("select row_id, alpha[1] from 'RUN/data/*.parquet'").fetchall()
    assert [row_id for row_id, _ in rows] == loaded["row_id"]


def test_other_parameters_are_refused_by_name(batch: Command) -> None:
    ten_rows()
    batch("plan", "in.jsonl", "--out", "RUN", *SHORT)
    code, _, errors = batch(
        "run", "in.jsonl", "--out", "RUN", *SHORT, "--temperature", 0.5, "--chat"
    )
    assert code == 2 and "sampling.temperature was 1.0 and is 0.5" in errors
    assert "reading.chat was false and is true" in errors and "max_tokens" not in errors
    ten_rows("other.jsonl")
    assert "inputs.other.jsonl was null" in batch("run", "other.jsonl", "--out", "RUN", *SHORT)[2]
    Path("in.jsonl").write_text('{"prompt": "changed"}\n')
    assert "inputs.in.jsonl was" in batch("run", "in.jsonl", "--out", "RUN", *SHORT)[2]
    assert not list(Path("RUN/data").iterdir())


@pytest.mark.parametrize(("step", "advice"), [(1, "Upgrade midlogit"), (-1, "Use that version")])
def test_another_schema_is_refused(batch: Command, step: int, advice: str) -> None:
    ten_rows()
    batch("plan", "in.jsonl", "--out", "RUN", *SHORT)
    manifest = Path("RUN/plan/manifest.json")
    number = '"schema_version": {}'
    own, other = number.format(SCHEMA_VERSION), number.format(SCHEMA_VERSION + step)
    manifest.write_text(manifest.read_text().replace(own, other))
    for command in (
        ("run", "in.jsonl", "--out", "RUN", *SHORT),
        ("status", "RUN"),
        ("verify", "RUN"),
    ):
        code, _, errors = batch(*command)
        assert code == 2 and advice in errors


def test_rollouts_are_stored_with_the_trainers_log_probabilities(
    batch: Command, models: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    """The preset reaches the job, and both models' tempered log-probabilities of each id its results."""
    Path("in.jsonl").write_text(
        '{"prompt": [5, 6, 7, 8]}\n{"prompt": [9, 6, 7], "max_tokens": 6}\n'
    )
    given = ("--preset", "rollout", "--max-tokens", 8, "--temperature", 0.7, "--n", 2)
    assert batch("run", "in.jsonl", "--out", "RUN", *given)[0] == 0
    params = Job.open("RUN").manifest.params
    assert (params.stop_id, params.alpha_rule) == ("base", KLBudget(0.02))
    for row in pq.read_table("RUN/data").to_pylist():
        prompt = json.loads(row["prompt"])
        for side, model in zip(("base", "teacher"), models, strict=True):
            found = row[f"{side}_tempered_logprobs"]
            truth = tempered(model, prompt, row["token_ids"], 0.7)
            assert found == pytest.approx(truth, abs=2e-5)
            assert row[f"sum_{side}_tempered_logprob"] == pytest.approx(sum(found), abs=1e-4)
            assert row[f"{side}_support_logmass"] == pytest.approx([0.0] * len(found), abs=1e-5)
            assert row[f"{side}_tempered_bound"] == [0.0] * len(found)


def test_wrong_rows_are_named_before_anything_runs(batch: Command) -> None:
    write_lines(
        "in.jsonl",
        {"id": "a", "prompt": "The fox"},
        {"id": "b", "question": "no prompt"},
        "no JSON",
        {"id": "c", "prompt": "word " * 3000},
        {"id": "d", "prompt": "The dog", "temperature": -1},
        {"id": "e", "messages": [{"role": "nobody", "content": "?"}]},
    )
    line = ("in.jsonl", "--out", "RUN", *SHORT)
    code, _, errors = batch("run", *line)
    assert code == 2 and not Path("RUN/plan").exists()
    assert "5 of 6 rows cannot be honoured" in errors and errors.count("in.jsonl, line") == 5
    assert "context window" in errors and "temperature" in errors

    code, out, _ = batch("run", *line, "--max-errors", 5)
    assert code == 4 and "6 of 6 completions" in out and "5 errors" in out
    assert batch("verify", "RUN")[0] == 0
    code, out, _ = batch("retry", "RUN", "--errors")
    assert code == 4 and "5 errors" in out  # the rows are as wrong as before


def test_ids_that_occur_twice(batch: Command) -> None:
    write_lines("a.jsonl", {"id": "x", "prompt": "a"}, {"id": "y", "prompt": "b"})
    write_lines("b.jsonl", {"id": "x", "prompt": "c"})
    code, _, errors = batch("run", "a.jsonl", "b.jsonl", "--out", "RUN")
    assert code == 2 and "'x' (a.jsonl, line 1 and b.jsonl, line 1)" in errors
    write_lines("same.txt", "The fox", "The fox")
    assert batch("run", "same.txt", "--out", "SAME", *SHORT)[0] == 0
    (table,) = Job.open("SAME").tables()
    first, second = table.column("token_ids").to_pylist()
    assert first != second  # the same prompt twice on purpose: two independent draws


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere.jsonl", "--out", "RUN"), "nowhere.jsonl"),
        (("empty.jsonl", "--out", "RUN"), "no prompt"),
        (("in.jsonl", "--out", "RUN", "--prompt-column", "question"), "'id', 'prompt'"),
        (("in.jsonl", "--out", "in.jsonl"), "is a file"),
        (("in.jsonl", "--out", "full"), "holds no job but note.txt"),
        (("--out", "RUN"), "There is no input"),
        (("in.jsonl", "--out", "RUN", "--diagnostics", "some"), "full, compact, none"),
        (("in.jsonl", "--out", "RUN", "--worker", "2/2"), "Workers are 0/n"),
        (("in.jsonl", "--out", "RUN", "--worker", "first"), "INDEX/COUNT"),
        (("in.jsonl", "--out", "RUN", "--max-errors", "few"), "a share such as 1%"),
        (("in.jsonl", "--out", "RUN", "--rows-per-part", "0"), "at least 1"),
        (("clash.jsonl", "--out", "RUN"), "Rename"),
    ],
)
def test_what_cannot_begin(batch: Command, arguments: tuple[object, ...], says: str) -> None:
    ten_rows()
    write_lines("empty.jsonl")
    write_lines("clash.jsonl", {"prompt": "a", "alpha": 0.5})
    Path("full").mkdir()
    Path("full/note.txt").touch()
    code, _, errors = batch("run", *arguments)
    assert code == 2 and says in errors, errors
    assert not Path("RUN/plan").exists() and not list(Path().glob("RUN/plan.*"))


def test_a_row_of_ten_megabytes(batch: Command) -> None:
    write_lines(
        "in.jsonl", {"id": "a", "prompt": "a", "blob": "x" * 10_000_000}, {"prompt": "b", "id": "b"}
    )
    assert batch("run", "in.jsonl", "--out", "RUN", *SHORT)[0] == 0
    (table,) = Job.open("RUN").tables()
    assert [len(blob or "") for blob in table.column("blob").to_pylist()] == [10_000_000, 0]
    write_lines("long.jsonl", {"prompt": "a " * 5_000_000})
    code, _, errors = batch("run", "long.jsonl", "--out", "LONG", *SHORT)
    assert code == 2 and "long.jsonl, line 1: The base prompt has" in errors


def test_columns_that_are_parameters_and_columns_that_are_carried(batch: Command) -> None:
    table = pa.table(
        {
            "id": [1, 2],
            "prompt": ["The fox", "The dog"],
            "n": pa.array([2, None], pa.int32()),
            "max_tokens": [2, 3],
            "reward_model": [{"style": "rule", "ground_truth": "4"}] * 2,
        }
    )
    pq.write_table(table, "in.parquet")
    assert batch("run", "in.parquet", "--out", "RUN", *SHORT, "--top-logprobs", 3)[0] == 0
    (results,) = Job.open("RUN").tables()
    rows = results.to_pylist()
    assert [(r["row_id"], r["sample"], r["completion_tokens"]) for r in rows] == [
        ("1", 0, 2),
        ("1", 1, 2),
        ("2", 0, 3),
    ]
    assert rows[0]["reward_model"] == {"style": "rule", "ground_truth": "4"}
    assert [len(ids) for ids in rows[2]["top_base_ids"]] == [3, 3, 3]
    assert batch("verify", "RUN")[0] == 0


def test_a_second_run_beside_the_first(batch: Command) -> None:
    ten_rows()
    batch("plan", "in.jsonl", "--out", "RUN", *SHORT)
    first = Presence(RunFolder(Path("RUN")), "0/1")
    code, _, errors = batch("run", "in.jsonl", "--out", "RUN", *SHORT)
    assert code == 1 and "--worker 0/2" in errors
    first.close()
    assert batch("run", "in.jsonl", "--out", "RUN", *SHORT)[0] == 0


def test_signals_leave_a_job_that_goes_on(batch: Command, pair: Pair) -> None:
    ten_rows()
    line = ("in.jsonl", "--out", "RUN", "--n", 8, "--max-tokens", 40, "--rows-per-part", 4)
    ended: list[object] = []
    pair.observer = ended.append
    try:
        for numbers in ((signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)):
            ended.clear()

            def shoot(numbers: tuple[int, ...] = numbers) -> None:
                while not ended:
                    time.sleep(0.01)
                for number in numbers:
                    os.kill(os.getpid(), number)
                    time.sleep(0.02)

            thread = threading.Thread(target=shoot)
            thread.start()
            code, out, _ = batch("run", *line)
            thread.join()
            assert code == 75 and not out.startswith("RUN: 0 of")
    finally:
        pair.observer = None
    assert batch("run", *line)[0] == 0 and batch("verify", "RUN")[0] == 0
    assert [path.suffix for path in Path("RUN/workers").iterdir()] == [".lock"]
    assert not any(Path("RUN/claims").iterdir()) and not any(Path("RUN/journal").iterdir())


def test_a_full_disk(batch: Command, small_disk: Path) -> None:
    ten_rows()
    line = ("in.jsonl", "--out", small_disk / "RUN", "--n", 16, "--max-tokens", 30)
    code, _, errors = batch("run", *line)
    assert code == 1 and "No space left on device" in errors and "is kept" in errors
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    kept = Job.open(small_disk / "RUN").status().done
    assert kept > 0
    code, out, _ = batch("run", *line)
    assert code == 0 and "160 of 160" in out
    assert batch("verify", small_disk / "RUN")[0] == 0


def test_a_read_only_disk(batch: Command, small_disk: Path) -> None:
    ten_rows()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, _, errors = batch("run", "in.jsonl", "--out", small_disk / "RUN", *SHORT)
    assert code == 1 and "Read-only file system" in errors and "another folder" in errors

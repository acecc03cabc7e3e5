"""Inputs of any length: rows are read as there is room, and printed in order all the same."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from midlogit import Pair, SamplingParams
from midlogit.cli.generate import MOST_WAITING, Feed, Job
from midlogit.cli.inputs import Input
from midlogit.cli.printer import Printer
from midlogit.engines.base import Engine
from midlogit.engines.draft_length import DraftLength
from midlogit.jobs.inputs import Columns, Row
from midlogit.pair import WINDOW
from midlogit.requests.sequence import Sequence
from tests.cli.test_cli import COMMAND


def test_rows_of_a_pipe_are_answered_as_they_come() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "--json", "--max-tokens", "3", "--device", "cpu"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    for prompt in ("Once upon a time", "The dog"):
        process.stdin.write(prompt.encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["prompt"] == prompt

    process.send_signal(signal.SIGINT)  # while it waits for the next row
    assert process.wait(60) == 130
    rest, errors = process.communicate()
    assert (rest, errors) == (b"", b"")


class Stalls(Engine):
    """Ends each sequence at once, but the first when it is told."""

    def __init__(self) -> None:
        super().__init__(DraftLength("off"), max_num_seqs=3)
        self.first: Sequence | None = None

    def submit(self, sequence: Sequence) -> None:
        if self.first is None:
            self.first = sequence
        else:
            sequence.fail("made to fail")

    def abort(self, sequences: list[Sequence]) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_slow_row_holds_a_bounded_number_of_others(
    pair: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.txt").write_text("".join(f"row {n}\n" for n in range(500)))
    read = 0

    def counted() -> Iterator[Row]:
        nonlocal read
        for row in source:
            read += 1
            yield row

    job = Job(
        [], tmp_path / "rows.txt", "utf-8", Columns(), None, False, SamplingParams(n=2),
        stream=False, json=False, strict=False,
    )  # fmt: skip
    source = job.source()
    assert isinstance(source, Input)
    engine = Stalls()
    printer = Printer(2, json=False, stream=False)
    feed = Feed(job, source, counted(), Pair(pair.mixing, engine), printer)

    def deliver() -> None:
        feed.fill()
        while (event := feed.batch.poll(0)) is not None:
            printer.add(event)
            feed.fill()

    deliver()
    most = (MOST_WAITING + WINDOW) * engine.max_num_seqs + 2
    assert 2 * read <= most and feed.batch.num_running == 1
    assert capfd.readouterr().err == ""

    assert engine.first is not None
    engine.first.fail("made to fail")
    deliver()
    assert read == 500 and feed.is_over and feed.batch.is_over and printer.num_waiting == 0
    lines = [line.split(":")[1] for line in capfd.readouterr().err.splitlines()]
    assert lines == [f" {tmp_path}/rows.txt, line {n + 1}" for n in range(500)]

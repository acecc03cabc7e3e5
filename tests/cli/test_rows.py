"""No row is lost, torn or printed twice: refused prompts, signals, full disks, encodings."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from midlogit import Interrupted, Pair, SamplingParams
from midlogit.cli import console, main
from midlogit.cli.console import Output, OutputLost, Signals
from midlogit.delivery import Batch
from tests.cli.test_cli import COMMAND

Command = Callable[..., tuple[int, list[str], str]]
LONG = "word " * 2000


@pytest.fixture
def command(
    pair: Pair, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """`midlogit` in this process, with the pair that is open already: exit code, lines, errors."""

    @contextmanager
    def opened(*_: object, **__: object) -> Iterator[Pair]:
        yield pair

    monkeypatch.setattr("midlogit.cli.generate.open_pair", opened)
    monkeypatch.setattr("midlogit.cli.demo.open_pair", opened)

    def call(
        *arguments: object, name: str = "generate", encoding: str = "utf-8"
    ) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["midlogit", name, "--seed", "1", *map(str, arguments)])
        monkeypatch.setattr(
            sys, "stdout", io.TextIOWrapper(io.FileIO(1, "wb", closefd=False), encoding)
        )
        with pytest.raises(SystemExit) as ended:
            main.run()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out.splitlines(), said.err

    return call


def test_a_refused_row_costs_no_other(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "three.txt"
    file.write_text(f"Once upon a time\n\n{LONG}\nThe dog\n")
    short = ("--input", file, "--max-tokens", 3)
    code, lines, errors = command(*short, "--json", "--n", 2)
    rows = [json.loads(line) for line in lines]
    assert code == 1
    assert [(row["index"], row["sample"]) for row in rows] == [
        (i, s) for i in range(3) for s in range(2)
    ]
    assert [row["finish_reason"] for row in rows[2:4]] == ["error", "error"]
    assert all(len(row["token_ids"]) == 3 for row in rows[:2] + rows[4:])
    assert (
        f"three.txt, line 3: The base prompt has {len(LONG.split()) + 2} tokens" in rows[2]["error"]
    )
    assert errors == f"midlogit: {rows[2]['error']}\n"

    code, lines, errors = command(*short)
    assert (code, len(lines), errors.count("line 3")) == (1, 2, 1)
    code, streamed, errors = command(*short, "--stream")
    assert (code, streamed, errors.count("line 3")) == (1, lines, 1)
    assert command(*short, "--strict")[:2] == (2, [])
    assert command("a", LONG, "b", "--max-tokens", 2)[0] == 1
    assert command(LONG, LONG)[:2] == (2, [])  # nothing else to run


def test_bad_lines_of_json_are_rows(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "Once", "b": "The"}\n\nnot json\n{"prompt": ""}\n{"prompt": [5, 99999]}\n'
        '{"messages": [{"role": "user"}]}\n{"messages": [{"role": "user", "content": "Hi"}]}\n{"prompt": [5, 6]}\n'
    )
    code, lines, errors = command("--input", file, "--json", "--max-tokens", 2)
    rows = [json.loads(line) for line in lines]
    reasons = [row["finish_reason"] for row in rows]
    assert (code, reasons) == (
        1,
        ["length", "error", "error", "error", "error", "length", "length"],
    )
    for row, line in zip(rows[1:5], (3, 4, 5, 6), strict=True):
        assert (
            f"rows.jsonl, line {line}: " in row["error"] and f"midlogit: {row['error']}\n" in errors
        )
    assert rows[6]["prompt"] == [5, 6]
    file.write_text('{"prompt": "Once", "b": "The"}\n')
    row = json.loads(
        command("--input", file, "--base-prompt-column", "b", "--json", "--max-tokens", 2)[1][0]
    )
    assert (row["prompt"], row["base_prompt"]) == ("Once", "The")
    file.write_text("\nnot json\n")
    assert command("--input", file, "--strict")[:2] == (2, [])
    assert command("--input", file)[0] == 1


def test_strict_checks_all_of_a_pipe_before_anything_runs(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def piped(text: str, *arguments: object) -> tuple[int, list[str], str]:
        read, write = os.pipe()
        with os.fdopen(write, "w") as pipe:
            pipe.write(text)
        with os.fdopen(read) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            return command("--max-tokens", 2, *arguments)

    code, lines, errors = piped(f"Once\n{LONG}\nThe dog\n{LONG}\n", "--strict")
    assert (code, lines) == (2, [])
    assert "standard input, line 2: The base prompt has" in errors
    assert errors.endswith(" 1 more cannot be honoured.\n")
    assert piped("Once\nThe dog\n", "--strict")[::2] == (0, "")
    assert piped(f"Once\n{LONG}\nThe dog\n")[0] == 1


def test_an_input_that_breaks_off_costs_no_row_before(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("midlogit.cli.inputs.FIRST_ROWS", 1)
    file = tmp_path / "cut.jsonl.gz"
    rows = [json.dumps({"prompt": "Once", "noise": os.urandom(9000).hex()}) for _ in range(4)]
    file.write_bytes(gzip.compress("\n".join(rows).encode())[:-4000])
    code, lines, errors = command("--input", file, "--json", "--max-tokens", 2)
    assert (code, len(lines), errors.count("\n")) == (2, 3, 1)
    assert f"Cannot read {file} beyond line 3" in errors


def test_refused_prompts_in_python(pair: Pair) -> None:
    found = sorted(
        pair.as_completed(["a", LONG, "b"], SamplingParams(max_tokens=2), strict=False),
        key=lambda c: c.index,
    )
    assert [c.finish_reason for c in found] == ["length", "error", "length"]
    assert "The base prompt has" in str(found[1].error) and found[1].token_ids == []


SHOTS = """
import json, os, random, signal, sys, threading, time
from contextlib import contextmanager
from pathlib import Path
from midlogit import Pair, SamplingParams
from midlogit.cli import console, generate
from midlogit.jobs.inputs import Columns
from midlogit.cli.loading import PairOptions

def nothing(*_): pass
for number in console.SIGNALS:
    signal.signal(number, nothing)
rows, file = 60, Path(sys.argv[1])
pair = Pair.local(device="cpu", speculation="off")
ended = []
pair.observer = lambda sequence: ended.append(sequence)

@contextmanager
def opened(*_, **__):
    yield pair

generate.open_pair = opened
prompts = [f"The fox number {i}" for i in range(rows)]
params = SamplingParams(max_tokens=2, ignore_eos=True, seed=1)
job = generate.Job(prompts, None, "utf-8", Columns(), None, False, params, stream=False, json=True, strict=False)
deadline = time.monotonic() + 8
random.seed(7)
shots = torn = 0
while time.monotonic() < deadline:
    target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.close(target)
    console.set_up_streams()
    ended.clear()
    sent = [random.choice(console.SIGNALS) for _ in range(random.choice([1, 1, 2, 3]))]
    times, finished = [random.uniform(0, 0.4)] + [random.uniform(0.01, 0.03) for _ in sent[1:]], []

    def send():
        for number, delay in zip(sent, times):
            before = [s.request.index for s in list(ended) if s.completion.finish_reason == "length"]
            time.sleep(delay)
            if over.is_set():
                return
            finished.append(before)
            os.kill(os.getpid(), number)

    over = threading.Event()
    thread = threading.Thread(target=send)
    thread.start()
    try:
        code = generate.run_generate(job, PairOptions())
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code
    over.set()
    thread.join()
    pair.generate(["a"], params)  # by its end the engine has dropped what a second signal left
    lines = file.read_bytes().split(b"\\n")
    assert lines.pop() == b"", "the last line is not whole"
    found = [json.loads(line) for line in lines]
    index = [row["index"] for row in found]
    assert index == sorted(set(index)), index
    whole = {row["index"] for row in found if row["finish_reason"] == "length"}
    if code == 0:
        assert len(whole) == rows
    elif finished:
        assert code == 128 + sent[0], (code, sent)
        assert set(finished[1 if len(finished) > 1 else 0]) <= whole, (finished, whole)
        assert len(found) in (0, rows) or len(finished) > 1
        torn += 0 < len(whole) < rows
    shots += 1
print(shots, torn, file=sys.stderr)
pair.close()
"""


def test_no_signal_at_any_moment_costs_a_finished_row(tmp_path: Path) -> None:
    """One to three signals of any kind, at random moments of a batch, again and again."""
    done = subprocess.run(
        [sys.executable, "-c", SHOTS, str(tmp_path / "rows.jsonl")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shots, torn = map(int, done.stderr.split()[-2:])
    assert shots >= 10 and torn >= 3


def test_a_signal_within_a_write_tears_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes seven bytes at a time, and a signal after each."""
    write = os.write

    def stutter(descriptor: int, data: memoryview) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return write(descriptor, bytes(data[:7]))

    monkeypatch.setattr(console.os, "write", stutter)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Output()), "utf-8"))
    row = json.dumps({"text": "café" * 3000}).encode()
    with Signals() as signals, signals.noted():
        console.write_json_line(row)
        console.write_json_line(row)
    monkeypatch.undo()
    assert signals.count > 2 and signals.code == 130
    assert capfd.readouterr().out == row.decode() + "\n" + row.decode() + "\n"


def test_a_second_interrupt_ends_the_wait_for_the_rest(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Batch, "stop", interrupted)
    found = Batch.__next__

    def once_then_interrupted(batch: Batch) -> object:
        found(batch)  # lost between the queue and whoever asked for it
        raise KeyboardInterrupt

    monkeypatch.setattr(Batch, "__next__", once_then_interrupted)
    with pytest.raises(Interrupted) as caught:
        pair.generate(["a", "b"], SamplingParams(max_tokens=2, ignore_eos=True))
    assert "length" in [c.finish_reason for c in caught.value.completions]


FULL = """
import resource, sys
from midlogit.cli import console
console.set_up_streams()
resource.setrlimit(resource.RLIMIT_FSIZE, (25, 25))
try:
    for i in range(9):
        console.write_json_line(b'{"row":%d}' % i)
except console.OutputLost as error:
    console.complain(error)
    sys.exit(1)
"""


def test_a_full_disk_holds_whole_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-c", FULL], stdout=out, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "File too large" in done.stderr and file.read_text() == '{"row":0}\n{"row":1}\n'


def test_a_reader_who_takes_nothing_is_not_waited_for_after_a_second_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, write = os.pipe()
    kept = os.dup(1)
    os.dup2(write, 1)
    try:
        monkeypatch.setattr(console, "PATIENCE_S", 0.15)
        monkeypatch.setattr(Output, "is_hurried", True)
        with pytest.raises(OutputLost, match="Nobody reads"):
            Output().write(b"x" * 10**6)
    finally:
        os.dup2(kept, 1)
        for descriptor in (read, write, kept):
            os.close(descriptor)


@pytest.mark.parametrize(
    ("shell", "says"),
    [
        ("presets > /dev/full", "No space left"),
        ("--help > /dev/full", "No space left"),
        ("presets >&-", "Standard output is closed"),
        ("presets < /dev/null >&- 2>&-", ""),
    ],
)
def test_output_that_takes_nothing_is_one_line(shell: str, says: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m midlogit {shell}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "") and says in done.stderr
    assert done.stderr.count("\n") == bool(says), done.stderr


def test_a_reader_that_has_gone_is_one_line() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "presets"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "has gone" in done.stderr


def test_bytes_of_another_encoding_are_told_before_anything_is_loaded() -> None:
    done = subprocess.run(
        [*COMMAND, "generate", "--json"], input=b"\ncaf\xe9 is open\nThe dog\n", capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert (
        b"standard input, line 2: The byte 0xe9 is not UTF-8." in done.stderr
        and b"--encoding" in done.stderr
    )


def test_any_encoding_of_the_output_and_of_arguments(command: Command) -> None:
    code, lines, errors = command(
        "--json", "--max-tokens", 2, "你好", "caf\udce9", "The dog", encoding="latin-1"
    )
    assert [json.loads(line)["prompt"] for line in lines] == ["你好", None, "The dog"]
    assert (code, errors.count("\n")) == (
        1,
        1,
    ) and "prompt 2: It holds bytes that are not UTF-8" in errors
    for encoding in ("ascii", "latin-1"):
        code, lines, errors = command("你好", "--max-tokens", 2, name="demo", encoding=encoding)
        assert (code, errors) == (0, "") and "prompt   ??" in lines

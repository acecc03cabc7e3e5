"""The command line as a user runs it: a process, its two outputs, its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import midlogit
from midlogit import Pair, SamplingParams
from tests.commands import run
from tests.conftest import BASE, TEACHER
from tests.questions import QUESTIONS

COMMAND = [sys.executable, "-m", "midlogit"]
DIAGNOSTICS = (
    "alpha", "kl_base", "kl_teacher", "entropy", "ess_base", "ess_teacher", "ess_ratio",
    "logprobs", "base_logprobs", "teacher_logprobs", "forced",
)  # fmt: skip


def test_json_holds_the_contract(pair: Pair) -> None:
    done = run(
        "generate",
        *QUESTIONS[:3],
        "--chat",
        "--json",
        "--seed",
        7,
        "--max-tokens",
        12,
        "--n",
        2,
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(c["index"], c["sample"]) for c in lines] == [
        (i, s) for i in range(3) for s in range(2)
    ]
    for line in lines:
        assert {
            "prompt",
            "text",
            "token_ids",
            "finish_reason",
            "stop_reason",
            "usage",
            "diagnostics",
        } <= line.keys()
        assert {len(line["diagnostics"][name]) for name in DIAGNOSTICS} == {len(line["token_ids"])}
        assert line["prompt"] == QUESTIONS[line["index"]]
        assert line["usage"]["completion_tokens"] == len(line["token_ids"])
    params = SamplingParams.preset("balanced", seed=7, max_tokens=12, n=2)
    assert [c["token_ids"] for c in lines] == [
        c.token_ids for c in pair.generate(QUESTIONS[:3], params, chat=True)
    ]


def test_text_of_prompts_from_standard_input(pair: Pair) -> None:
    done = run(
        "generate",
        "--chat",
        "--temperature",
        0,
        "--max-tokens",
        12,
        "--device",
        "cpu",
        stdin="\n".join(QUESTIONS[:2]) + "\n\n",
    )
    params = SamplingParams.preset("balanced", temperature=0, max_tokens=12)
    assert done.returncode == 0
    assert done.stdout == "".join(
        c.text + "\n" for c in pair.generate(QUESTIONS[:2], params, chat=True)
    )
    assert done.stderr == ""


def test_streaming_prints_the_same_text() -> None:
    arguments = (
        "generate",
        QUESTIONS[0],
        "--chat",
        "--seed",
        7,
        "--max-tokens",
        30,
        "--device",
        "cpu",
    )
    assert run(*arguments, "--stream").stdout == run(*arguments).stdout != ""


def test_drafts_change_nothing_that_is_printed() -> None:
    asked = [
        "generate",
        *QUESTIONS[:2],
        "--chat",
        "--json",
        "--seed",
        5,
        "--max-tokens",
        24,
        "--device",
        "cpu",
    ]
    off, four = (run(*asked, "--speculation", speculation) for speculation in ("off", 4))
    assert off.returncode == four.returncode == 0, off.stderr + four.stderr
    texts = [
        [json.loads(line)["token_ids"] for line in done.stdout.splitlines()] for done in (off, four)
    ]
    assert len(texts[0]) == 2 and texts[0] == texts[1]


def test_the_base_may_see_another_prompt() -> None:
    arguments = ("generate", "Why?", "--json", "--seed", 1, "--max-tokens", 4, "--device", "cpu")
    same, other = (
        json.loads(run(*arguments, *more).stdout)
        for more in ((), ("--base-prompt", "Once upon a time"))
    )
    assert same["base_prompt"] == "Why?" and other["base_prompt"] == "Once upon a time"
    assert same["diagnostics"]["kl_base"] != other["diagnostics"]["kl_base"]


def test_options_reach_the_sampler() -> None:
    arguments = ("generate", QUESTIONS[2], "--chat", "--json", "--seed", 1, "--device", "cpu")
    fixed = json.loads(
        run(
            *arguments, "--alpha-rule", "fixed:0.25", "--preset", "exploratory", "--max-tokens", 6
        ).stdout
    )
    assert fixed["diagnostics"]["alpha"] == [0.25] * 6
    stopped = json.loads(run(*arguments, "--stop", ".", "--target-top-p", 0.5).stdout)
    assert stopped["stop_reason"] == "." and "." not in stopped["text"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["generate", "a", "--preset", "bold"], 2, "Use conservative, balanced, exploratory"),
        (["generate", "a", "--alpha-rule", "middle"], 2, "equal-kl, fixed:ALPHA"),
        (["generate", "a", "--max-tokens", "0"], 2, "max_tokens is 0"),
        (["generate", "a", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["generate", "a", "--target-top-p", "1.5"], 2, "(0, 1]"),
        (["generate", "a", "--n", "0"], 2, "n is 0"),
        (["generate", "a", "--device", "gpu7"], 2, "gpu7"),
        (["generate", "a", "--base", "X"], 2, "--teacher is missing"),
        (["generate", "a", "--json", "--stream"], 2, "exclude each other"),
        (["generate", "a", "--speculation", "17"], 2, "speculation is 17"),
        (["serve", "--speculation=-1"], 2, "speculation is -1"),
        (["generate", "a", "--speculation", "fast"], 2, "Use auto, off, or 0 to 16"),
        (["generate", "a", "--nonsense"], 2, "No such option"),
        (["generate", "- a list"], 2, "generate -- '- a list'"),
        (["demo", "-5°C"], 2, "demo -- '-5°C'"),
        (["generate", "a", "--n", "100000000000"], 2, "n is 100000000000"),
        (["generate", "a", "--device", "meta"], 2, "Device 'meta' cannot be used"),
        (["generate", "a", "--input", "b"], 2, "prompts on the command line and an input"),
        (["generate", "--input", "."], 2, "Cannot read .: Is a directory"),
        (
            ["generate", "--base", "http://[::1/v1", "--teacher", "http://[::1/v1", "a"],
            2,
            "'http://[::1/v1'",
        ),
        (
            ["generate", "--base", "localhost:1", "--teacher", "localhost:1", "a"],
            2,
            "mean http://localhost:1/v1?",
        ),
        (["doctor", "--dtype", "int3"], 2, "Unknown dtype 'int3'"),
        (["generate"], 2, "holds no prompt"),
        (["generate", ""], 2, "prompt 1: The base prompt is empty"),
        (["generate", "word " * 2000], 2, "context window"),
        (
            ["generate", "a", "--base", "./nothing", "--teacher", "./nothing"],
            1,
            "no model folder ./nothing",
        ),
        (
            ["doctor", "--base", "./nothing", "--teacher", str(TEACHER)],
            1,
            "no model folder ./nothing",
        ),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_mistakes_are_one_line_and_a_code(arguments: list[str], code: int, says: str) -> None:
    done = run(*arguments, stdin="")
    assert done.returncode == code, done.stderr
    assert done.stdout == "" and says in done.stderr
    assert "Traceback" not in done.stderr
    own = [line for line in done.stderr.splitlines() if line.startswith("midlogit:")]
    assert len(own) == 1 or "Usage:" in done.stderr


def test_interrupted_it_prints_what_was_finished() -> None:
    room, context = 3, 1024
    prompts = [" the" * (context - room - 2), "Tell me a story.", " cat" * (context - room - 2)]
    arguments = [
        "generate",
        "--json",
        "--max-tokens",
        "900",
        "--preset",
        "exploratory",
        "--seed",
        "1",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [*COMMAND, *arguments, *prompts, "--min-tokens", "900"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.readline()  # the first completion is printed while the second still runs
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    lines = [json.loads(line) for line in (first + rest).splitlines()]
    assert process.returncode == 130, errors
    assert [c["index"] for c in lines] == [0, 1, 2]
    assert lines[0]["finish_reason"] == "length" and lines[1]["finish_reason"] == "abort"
    assert len(lines[1]["token_ids"]) >= 1 and "Traceback" not in errors


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", *QUESTIONS[:4], "--max-tokens", "4", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert "Traceback" not in errors


def test_demo_without_colour_when_not_a_terminal() -> None:
    done = run("demo", "--max-tokens", 40, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    for part in (
        "q*, coloured",
        "mean α",
        "largest |KL base − KL teacher|",
        "ESS ratio",
        "tokens/s",
        "disagree most",
    ):
        assert part in done.stdout
    assert done.stdout.count("      q*     ") == 3


def test_demo_in_colour_on_a_terminal() -> None:
    master, slave = os.openpty()
    process = subprocess.Popen(
        [*COMMAND, "demo", "--max-tokens", "10", "--device", "cpu"],
        stdout=slave, stderr=subprocess.DEVNULL, env={k: v for k, v in os.environ.items() if k != "NO_COLOR"},
    )  # fmt: skip
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # the terminal closes with its last writer
        pass
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert shown.count(b"\x1b[38;2;") > 10


def test_doctor_describes_the_pair() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    for part in (
        "0 <|endoftext|>",
        "1 <|end|>",
        "counted as one outcome",
        "shared ids differ",
        "KV cache",
        "can be mixed",
    ):
        assert part in done.stdout


def test_doctor_refuses_tokenizers_that_disagree(tmp_path: Path) -> None:
    import shutil

    from tests.local.test_bad_input import change_tokens

    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    change_tokens(base, 100)
    done = run("doctor", "--base", base, "--teacher", TEACHER)
    assert done.returncode == 1
    assert "cannot be mixed: The tokenizers disagree: 100 of" in done.stdout


def test_presets_and_version() -> None:
    assert [line.split()[0] for line in run("presets").stdout.splitlines()] == [
        "conservative",
        "balanced",
        "exploratory",
        "rollout",
    ]
    assert run("--version").stdout == f"midlogit {midlogit.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    """`--help` is quick because of what it does not import; a time would depend on the machine."""
    code = (
        "import sys; sys.argv = ['midlogit', '--help']\n"
        "from midlogit.cli.main import run\n"
        "try: run()\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'numpy', 'scipy', 'tqdm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

"""The commands with --engine vllm, as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from midlogit import Pair, SamplingParams
from tests.questions import QUESTIONS

COMMAND = [
    sys.executable,
    "-m",
    "midlogit",
    "generate",
    "--engine",
    "vllm",
    "--max-model-len",
    "256",
]
ENVIRONMENT = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}


def run(*arguments: str, prompts: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=prompts,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=240,
    )


def test_generates_what_the_local_engine_does(pair: Pair) -> None:
    asked = ["--dtype", "float32", "--temperature", "0", "--max-tokens", "12", "--json", "--chat"]
    done = run(*asked, prompts="\n".join(QUESTIONS[:3]))
    assert done.returncode == 0, done.stderr
    found = [
        json.loads(line) for line in done.stdout.splitlines()
    ]  # nothing of vLLM's is on standard output
    expected = pair.generate(QUESTIONS[:3], SamplingParams(temperature=0, max_tokens=12), chat=True)
    assert [c["token_ids"] for c in found] == [c.token_ids for c in expected]


def test_what_cannot_be_used_is_one_line_before_anything_is_loaded() -> None:
    for arguments, says in (
        (["--device", "cuda:1"], "--device cuda:1 cannot be used with vLLM"),
        (
            ["--base", "http://127.0.0.1:9/v1", "--teacher", "http://127.0.0.1:9/v1"],
            "--engine vllm runs models here",
        ),
        (["--gpu-memory-utilization", "2"], "gpu_memory_utilization is 2.0"),
        (["--max-model-len", "99999"], "max_model_len is 99999"),
    ):
        done = run("What is AI?", *arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and says in done.stderr

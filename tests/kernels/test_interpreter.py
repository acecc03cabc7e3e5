"""The fused kernels on the CPU through Triton's interpreter, in a process of their own: it is chosen at import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from midlogit.decide.kernels import available

pytest.importorskip("triton")
torch = pytest.importorskip("torch")


def test_kernels_agree_with_the_policy_and_the_reference() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count("check_") == 10


def test_the_cpu_is_left_to_the_policy() -> None:
    assert not available(torch.device("cpu"))

"""The scripts of examples/ run as processes against the session's two servers, and say what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.http.conftest import Urls

ROOT = Path(__file__).parents[2]


def output(name: str, urls: Urls) -> str:
    """The output of a script."""
    command = [sys.executable, str(ROOT / "examples" / name), urls.base, urls.teacher]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def numbers_of(name: str, text: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{name}\s+(-?[\d.]+)", text)]


def test_dual_prompts(urls: Urls) -> None:
    """Two questions, each with an answer and the mean α of its tokens."""
    answers = output("dual_prompts.py", urls)
    assert len(re.findall(r"\?\n  \S", answers)) == 2
    alphas = numbers_of("mean α", answers)
    assert len(alphas) == 2 and all(0 < alpha < 1 for alpha in alphas)


def test_constraint(urls: Urls) -> None:
    """Held to the nucleus, rows have less entropy; both times the two KLs are equal and the bounds say something."""
    report = output("constraint.py", urls)
    held, free = numbers_of("mean entropy", report)
    assert held < free
    assert all(0 < bound < 0.8 for bound in numbers_of("mean bound", report))
    for base, teacher in zip(
        numbers_of("mean kl_base", report), numbers_of("mean kl_teacher", report), strict=True
    ):
        assert base == pytest.approx(teacher, abs=0.02)


def test_first_token(urls: Urls) -> None:
    """Forced, the first α is 1; free, it is the mixture's."""
    forced, free = numbers_of("first α", output("first_token.py", urls))
    assert forced == 1 > free > 0


def test_asyncio_batch(urls: Urls) -> None:
    """64 prompts at once, all of them finished."""
    report = output("asyncio_batch.py", urls)
    assert report.count("Tell me a story about a fox") == 3
    tokens, succeeded = re.search(r"(\d+) tokens, (\d+)% succeeded", report).groups()
    assert int(tokens) > 64 and succeeded == "100"

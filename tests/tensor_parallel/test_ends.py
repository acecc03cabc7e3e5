"""A rank that dies: what runs ends with an error, the server ends with 1, and no process is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import TEACHER
from tests.server.conftest import COMMAND, events, process

# `midlogit serve`, whose models are not compiled.
EAGER = f"""
import functools
from midlogit import Pair

Pair.vllm = functools.partial(Pair.vllm, enforce_eager=True)
{COMMAND}
"""
LONG = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}


def children(pid: int) -> list[int]:
    """The child processes of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def is_there(pid: int) -> bool:
    """Whether a process runs, and is no zombie that its parent has not waited for."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


@contextmanager
def serving(wide_base: Path) -> Iterator[tuple[Any, int, Iterator[str]]]:
    """`midlogit serve` with two ranks, in the midst of a stream.

    Yields:
        (the process, the id of the other rank's process, the lines of the stream that are still to come)
    """
    models = "--base", str(wide_base), "--teacher", str(TEACHER)
    options = "--engine", "vllm", "--tensor-parallel-size", "2", "--dtype", "float32"
    with (
        process(*models, *options, code=EAGER, VLLM_CPU_KVCACHE_SPACE="1") as (child, http),
        http.stream("POST", "/v1/completions", json=LONG) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        (rank,) = [pid for pid in children(child.pid) if "vllm.rank" in command(pid)]
        yield child, rank, lines


def test_rank_1_is_killed(wide_base: Path) -> None:
    with serving(wide_base) as (child, rank, lines):
        os.kill(rank, signal.SIGKILL)
        start = time.monotonic()
        *_, last = events(lines)
        took = time.monotonic() - start
        _, log = child.communicate(timeout=60)
    assert last["error"]["code"] == "engine_failure"
    assert took < 10
    assert child.returncode == 1
    assert "Rank 1 of the pair has ended by signal 9" in log


def test_rank_0_is_killed(wide_base: Path) -> None:
    with serving(wide_base) as (child, rank, lines):
        child.kill()
        deadline = time.monotonic() + 10
        while is_there(rank) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_there(rank)
        with pytest.raises(httpx.TransportError):
            list(lines)

"""`midlogit batch run` with options of Ray that cannot be honoured; needs no Ray."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from midlogit import InvalidRequest
from midlogit.ray.parts import Replicas

COMMAND = [sys.executable, "-m", "midlogit", "batch", "run", "prompts.txt", "--out", "RUN"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--replicas", "1:2"], 2, "--replicas and --gpus-per-replica are for Ray."),
        (["--ray", "local", "--worker", "0/2"], 2, "--ray and --worker exclude each other."),
        (["--ray", "local"], 1, "Run: pip install 'midlogit[ray]'"),
    ],
)
def test_options(options: list[str], code: int, said: str, tmp_path: Path) -> None:
    if code == 1 and find_spec("ray") is not None:
        pytest.skip("Ray is installed here")
    (tmp_path / "prompts.txt").write_text("Why?\n")
    run = subprocess.run(
        [*COMMAND, *options], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120
    )
    assert run.returncode == code, run.stderr
    assert said in run.stderr and len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "RUN").exists()


def test_replicas() -> None:
    assert Replicas.parse("1:8", 2) == Replicas(1, 8, 2)
    assert Replicas.parse("4", None) == Replicas(4, 4, None)
    for text in ("", "8:1", "0", "1:", "a:b", "-1", "1:2:3"):
        with pytest.raises(InvalidRequest):
            Replicas.parse(text, 1)
    with pytest.raises(InvalidRequest, match="GPUs"):
        Replicas.parse("1", -1)

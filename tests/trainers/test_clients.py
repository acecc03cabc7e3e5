"""Trainers' own clients drive a `midlogit serve --train`, in environments below .cache: `make test-clients`.

slime is on no package index: MIDLOGIT_SLIME names a checkout of it, whose classes are then run as well. With
MIDLOGIT_PRIME_RL, a checkout too, prime-rl's own pool of inference servers takes part.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import midlogit
from midlogit import Pair
from midlogit.jobs.exports import export
from midlogit.models.checkpoint import bundled
from tests.jobs.small_jobs import TEXTS
from tests.jobs.small_jobs import run as run_job
from tests.server.test_operation import process
from tests.server.test_trainer_clients import checkpoint, sum_of
from tests.trainers.environments import install

STEP = 1  # of training, whose weights a client hands over


@dataclass(frozen=True)
class Served:
    """A server's address, its --weights-root, and what the sum of its base's weights is."""

    url: str
    root: Path

    def checksum(self) -> int:
        body = {"action": "checksum"}
        answer = httpx.post(f"{self.url}/weight_checker", json=body, timeout=60).json()
        return int(answer["checksums"]["base"])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    root = tmp_path / "weights"
    root.mkdir()
    options = ("--train", "--weights-root", str(root), "--base", str(bundled("base")))
    options += ("--teacher", str(bundled("teacher")), "--device", "cpu", "--dtype", "float32")
    with process(*options) as (_, http):
        yield Served(str(http.base_url).rstrip("/"), root)


def run(script: str, python: str | Path, folder: Path, *arguments: object, path: str = "") -> str:
    """Runs a client; its output."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH", "")))),
    }
    command = [str(python), str(Path(__file__).with_name(script)), *map(str, arguments)]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.endswith("fine\n"), ran.stdout + ran.stderr
    return ran.stdout


def test_prime_rl(served: Served, tmp_path: Path) -> None:
    checkout = os.environ.get("MIDLOGIT_PRIME_RL")
    parts = ("src", "packages/prime-rl-configs/src")
    path = os.pathsep.join(str(Path(checkout) / part) for part in parts) if checkout else ""
    weights = checkpoint(served.root, STEP)
    arguments = (served.url, bundled("base"), bundled("teacher"), weights)
    told = run("check_prime_rl.py", install("prime-rl"), tmp_path, *arguments, path=path)
    assert served.checksum() == sum_of(STEP)
    assert ("with prime-rl's own pool" in told) == bool(checkout)


def test_areal(served: Served, tmp_path: Path) -> None:
    weights = checkpoint(served.root, STEP)
    run("check_areal.py", install("areal"), tmp_path, served.url, weights)
    assert served.checksum() == sum_of(STEP)


def test_slime(pair: Pair, served: Served, tmp_path: Path) -> None:
    checkout = os.environ.get("MIDLOGIT_SLIME")
    if not checkout:
        pytest.skip("MIDLOGIT_SLIME names no checkout of slime")
    weights = checkpoint(served.root, STEP)
    prompts = tmp_path / "prompts.parquet"
    job = run_job(pair, tmp_path / "job", TEXTS, columns={"answer": ["a", "?", "b", "c"]})
    export(job, "slime-rl", prompts)
    arguments = (served.url, bundled("teacher"), weights, prompts)
    path = os.pathsep.join((checkout, str(Path(midlogit.__file__).parents[1])))
    run("check_slime.py", install("areal"), tmp_path, *arguments, path=path)
    assert served.checksum() == sum_of(STEP)

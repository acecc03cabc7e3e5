"""Trainers read the exports made for them, verl and axolotl in environments below .cache: `make test-exports`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from midlogit import Pair
from midlogit.jobs.exports import export
from tests.conftest import TEACHER
from tests.jobs.small_jobs import CHATS, TEXTS, run
from tests.trainers.environments import STEPS, install

ANSWERS = {"answer": ["a building", "?", "blue", "hello"]}
FORMATS = ("trl-sft", "trl-prompt", "verl-rl", "verl-sft", "axolotl-kd")


@pytest.fixture(scope="session")
def exports(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of exports of a job of chats and one of texts."""
    folder = tmp_path_factory.mktemp("exports")
    for name, prompts in (("chats", CHATS), ("texts", TEXTS)):
        job = run(pair, folder / name, prompts, columns=ANSWERS)
        for to in FORMATS:
            export(job, to, folder / f"{name}.{to}.parquet")
        of_teacher = folder / f"{name}.axolotl-kd-teacher.parquet"
        export(job, "axolotl-kd", of_teacher, top_of="teacher")
    return folder


@pytest.mark.parametrize("library", ["trl", *STEPS])
def test_reads(exports: Path, library: str) -> None:
    check = Path(__file__).with_name(f"check_{library}.py")
    environment = {
        **os.environ,
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_DATASETS_CACHE": str(exports / "cache"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    ran = subprocess.run(
        [install(library) if library in STEPS else sys.executable, check, exports, TEACHER],
        cwd=exports,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and ran.stdout.endswith("fine\n"), ran.stdout + ran.stderr

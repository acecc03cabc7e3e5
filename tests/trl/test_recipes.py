"""The recipes of examples/train that fit on a laptop, run as their users do, for one step."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and transformers

RECIPES = Path(__file__).parents[2] / "examples" / "train"


@pytest.mark.parametrize(
    ("script", "options", "curve"),
    [
        ("grpo.py", "--evaluate 8", "policy/success"),
        ("distill.py", "--repeats 1", "student/kl_per_token"),
    ],
)
def test_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, options: str, curve: str
) -> None:
    common = f"--steps 1 --batch 8 --every 1 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", [script, *f"{common} {options}".split()])
    runpy.run_path(str(RECIPES / script), run_name="__main__")

    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if curve in entry] == [0, 1]
    assert any("midlogit/alpha" in entry for entry in entries)

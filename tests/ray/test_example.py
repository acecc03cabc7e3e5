"""The pipeline of examples/ as a user runs it: a process that reads Parquet and writes Parquet."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from midlogit import Pair, SamplingParams
from tests.questions import QUESTIONS

ROOT = Path(__file__).parents[2]


def test_pipeline(pair: Pair, tmp_path: Path) -> None:
    """Two completions per prompt, drawn as the pair draws them for these ids."""
    ids = [f"row {n}" for n in range(len(QUESTIONS))]
    pq.write_table(pa.table({"id": ids, "prompt": list(QUESTIONS)}), tmp_path / "prompts.parquet")
    command = [ROOT / "examples" / "ray_pipeline.py", "prompts.parquet", "sampled"]
    run = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"32 completions in sampled, 0 errors, mean α 0\.\d+", run.stdout)

    rows = sorted(pq.read_table(tmp_path / "sampled").to_pylist(), key=lambda row: row["sample"])
    rows.sort(key=lambda row: ids.index(row["id"]))
    params = SamplingParams(max_tokens=24, n=2, seed=7)
    completions = pair.generate(QUESTIONS, params, chat=True, request_ids=ids)
    assert [row["token_ids"] for row in rows] == [c.token_ids for c in completions]

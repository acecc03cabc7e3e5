"""An engine that dies is no row's fault: nothing is written for it, and a part that kills engines is run row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from midlogit import EngineFailure, Pair
from midlogit.jobs import Job, JobOptions, PairSource
from midlogit.jobs.attempts import ISOLATE_AFTER
from midlogit.params import SamplingParams

POISON = "poison"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    rows = [{"id": f"r{n}", "prompt": POISON if n == 5 else f"The fox {n}"} for n in range(12)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = SamplingParams.preset("balanced", max_tokens=6)
    return Job.plan([source], tmp_path / "run", PairSource(), JobOptions(params, rows_per_part=4))


def mortal() -> Pair:
    """A pair whose engine dies in the first step after a poisoned prompt has been admitted."""
    pair = Pair.local(device="cpu", dtype="float32", speculation="off", max_num_seqs=3)
    engine, step = pair.engine, pair.engine.step

    def step_and_die() -> None:
        step()
        if any(s.request.prompt == POISON and s.token_ids for s in engine._live.values()):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine.step = step_and_die
    return pair


def test_a_part_that_kills_engines_is_isolated(job: Job, pair: Pair) -> None:
    deaths = 0
    while True:
        with mortal() as killed:
            try:
                job.run(killed, max_errors=1)
                break
            except EngineFailure as failure:
                deaths += 1
                assert "CUDA error" in str(failure) and "is kept" in str(failure)
                assert job.status().errors == (deaths > ISOLATE_AFTER)
    assert deaths == ISOLATE_AFTER + 1

    assert job.verify() == []
    rows = [row for table in job.tables() for row in table.to_pylist()]
    errors = {row["row_id"]: row["error"] for row in rows if row["error"] is not None}
    assert list(errors) == ["r5"] and "rows.jsonl, line 6: The engine died of it" in errors["r5"]

    # The cause is mended: the row is made again, and the rest is what an undisturbed job draws.
    assert job.run(pair, retry=True) and job.verify() == [] and job.status().errors == 0
    retried = [row for table in job.tables() for row in table.to_pylist()]
    assert [r for r in retried if r["row_id"] != "r5"] == [r for r in rows if r["row_id"] != "r5"]
    whole = pair.generate(
        [row["prompt"] for row in rows],
        SamplingParams.preset("balanced", max_tokens=6, seed=0),
        request_ids=[row["row_id"] for row in rows],
    )
    assert [row["token_ids"] for row in retried] == [c.token_ids for c in whole]

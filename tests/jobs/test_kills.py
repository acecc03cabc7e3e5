"""A job that is killed again and again ends with the data set of one that was not: each item once, the same tokens.

In float64: in float32 logits differ by about 1e-5 between batches, so that about one draw in 100,000 falls otherwise.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from midlogit.jobs import Job, JobOptions, PairSource
from midlogit.jobs.files import is_abandoned
from midlogit.params import SamplingParams

ROWS, N = 300, 2
OPTIONS = "--n 2 --seed 11 --max-tokens 10 --rows-per-part 40 --device cpu --dtype float64"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of different lengths, some of them equal."""
    path = tmp_path_factory.mktemp("kills") / "prompts.jsonl"
    rows = [
        {"id": f"row-{n}", "prompt": f"The {'old ' * (n % 7)}fox number {n % 100}", "tag": n}
        for n in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> Job:
    """The job that nobody killed, through the Python API and in other batches."""
    options = {"device": "cpu", "dtype": "float64", "max_num_seqs": 64}
    pair_source = PairSource("local", options=options)
    params = SamplingParams.preset("balanced", n=N, seed=11, max_tokens=10)
    job = Job.plan([source], source.parent / "whole", pair_source, JobOptions(params))
    with pair_source.open() as pair:
        assert job.run(pair)
    return job


@pytest.mark.parametrize(("kills", "workers"), [(6, 1), (5, 2)])
def test_kills_change_nothing(source: Path, undisturbed: Job, kills: int, workers: int) -> None:
    run = source.parent / f"killed-{workers}"
    told = subprocess.run(
        [
            *(sys.executable, "-m", "tests.jobs.killing"),
            *(source, run, str(kills), str(workers), "5"),
            *OPTIONS.split(),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert "Traceback" not in told.stderr
    assert set(told.stdout.split()) >= {"SIGKILL", "-9:"}, told.stdout

    job = Job.open(run)
    assert job.verify() == []
    require_equal(job, undisturbed)
    assert not list((run / "journal").iterdir())
    assert not [path for path in run.rglob("*") if is_abandoned(path.name)]


def require_equal(one: Job, other: Job) -> None:
    """The same rows in the same order, the same tokens, texts and diagnostics."""
    import pyarrow as pa

    ours, theirs = (pa.concat_tables(job.tables()) for job in (one, other))
    assert ours.schema.equals(theirs.schema) and len(ours) == len(theirs) == ROWS * N
    for name in ours.column_names:
        own, expected = ours.column(name).combine_chunks(), theirs.column(name).combine_chunks()
        if pa.types.is_list(own.type) and pa.types.is_floating(own.type.value_type):
            own, expected = own.flatten(), expected.flatten()
        if pa.types.is_floating(own.type):
            np.testing.assert_allclose(
                own.to_numpy(zero_copy_only=False),
                expected.to_numpy(zero_copy_only=False),
                rtol=1e-6,
                atol=1e-6,
                err_msg=name,
            )
        else:
            assert own.equals(expected), name

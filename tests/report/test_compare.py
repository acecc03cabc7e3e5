"""Two runs against pandas: which completions match, every difference, where texts part."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import orjson
import pandas as pd
import pytest

from midlogit.errors import InvalidRequest
from midlogit.report import make_report
from midlogit.report.compare import match
from midlogit.report.statistics import holm
from tests.report.conftest import PROMPTS, N
from tests.report.recomputed import bin_edges, frame_of, mean, repetition, tokens_of

KEYS = ["row_id", "sample"]
COLUMNS = {
    "mean_alpha": "mean_alpha", "mean_kl_base": "mean_kl_base", "mean_kl_teacher": "mean_kl_teacher",
    "max_kl": "max_kl", "mean_entropy": "mean_entropy", "completion_tokens": "completion_tokens", "stopped": "stopped",
    "logprob": "sum_logprob", "base_logprob": "sum_base_logprob", "teacher_logprob": "sum_teacher_logprob",
    "mean_ess_base": "ess_base", "mean_ess_teacher": "ess_teacher", "repetition": "repetition",
}  # fmt: skip


def values(run: Path) -> pd.DataFrame:
    """The finished completions of a run with what is compared of them."""
    rows = frame_of(run)
    done = rows[rows.error.isna()].copy()
    done["stopped"] = (done.finish_reason == "stop").astype(float)
    done["repetition"] = [repetition(ids) for ids in done.token_ids]
    for side in ("base", "teacher"):
        lists = zip(done[f"ess_{side}"], done.forced, strict=True)
        done[f"ess_{side}"] = [np.mean(np.asarray(ess, float)[~forced]) for ess, forced in lists]
    for name in ("sum_logprob", "sum_base_logprob", "sum_teacher_logprob"):
        done[name] /= done.completion_tokens
    return done


def test_every_difference_is_that_of_the_rows(runs: tuple[Path, Path]) -> None:
    found = orjson.loads(make_report(*runs).json())["comparison"]
    both = values(runs[0]).merge(values(runs[1]), on=KEYS, suffixes=("_1", "_2"))
    assert (found["matched"], found["rows"]) == (len(both), len(PROMPTS)) == (N * len(PROMPTS), 5)
    assert found["only_first"] == found["only_second"] == 0 and found["same_seed"]
    assert {entry["name"] for entry in found["differing"]} == {
        "sampling.constraint_to_target", "sampling.force_first_token"
    }  # fmt: skip

    metrics = {metric["name"]: metric for metric in found["metrics"]}
    assert metrics.keys() == COLUMNS.keys()
    for name, column in COLUMNS.items():
        one, two = both[f"{column}_1"].astype(float), both[f"{column}_2"].astype(float)
        paired = pd.DataFrame({"row_id": both.row_id, "difference": two - one})
        expected, metric = mean(paired, "difference"), metrics[name]
        assert metric["difference"] == pytest.approx(expected["mean"], rel=1e-5)
        for end in ("low", "high"):
            assert metric[end] == pytest.approx(expected[end], rel=1e-5, abs=1e-9)
        assert (metric["first"], metric["second"]) == (
            pytest.approx(one.mean()),
            pytest.approx(two.mean()),
        )
        spread = np.sqrt((one.var(ddof=0) + two.var(ddof=0)) / 2)
        assert metric["effect"] == pytest.approx(
            expected["mean"] / spread if spread else 0, rel=1e-4
        )
        assert metric["test"] == "sign flips" and 0 < metric["p"] <= 1
        if min(one.std(), two.std()):
            assert metric["correlation"] == pytest.approx(one.corr(two), rel=1e-5)
    assert [m["p_holm"] for m in found["metrics"]] == holm([m["p"] for m in found["metrics"]])


def test_where_texts_part_and_curves_differ(runs: tuple[Path, Path]) -> None:
    found = orjson.loads(make_report(*runs).json())["comparison"]
    first, second = (values(run).set_index(KEYS).sort_index() for run in runs)
    positions = []
    for a, b in zip(first.token_ids, second.token_ids, strict=True):
        unequal = [k for k in range(min(len(a), len(b))) if a[k] != b[k]]
        equal_length = np.inf if len(a) == len(b) else min(len(a), len(b))
        positions.append(unequal[0] if unequal else equal_length)
    positions = np.array(positions)
    texts = found["texts"]
    assert texts["pairs"] == len(positions)
    assert texts["identical"] == pytest.approx(np.mean(np.isinf(positions)))
    assert texts["median"] == np.median(positions[np.isfinite(positions)])
    for point in texts["together"]:
        assert point["share"] == pytest.approx(np.mean(positions >= point["tokens"]))
    assert texts["together"][0] == {"tokens": 0, "share": 1.0}

    frames = [frame_of(run) for run in runs]
    tokens = [tokens_of(frame[frame.error.isna()]) for frame in frames]
    edges = bin_edges(100)
    for name, curve in found["by_position"].items():
        for point in curve:
            assert point["first"] in edges
            inside = [
                t[~t.forced & t.position.between(point["first"], point["last"])] for t in tokens
            ]
            assert point["means"] == pytest.approx([t[name].mean() for t in inside])
            assert point["difference"] == pytest.approx(
                point["means"][1] - point["means"][0], abs=1e-9
            )
            assert point["low"] <= point["difference"] <= point["high"]


def test_a_run_against_itself_and_against_other_rows(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    same = make_report(runs[0], runs[0]).numbers["comparison"]
    assert same["texts"]["identical"] == 1 and same["differing"] == []
    assert all(m["difference"] == 0 and m["p_holm"] == 1 for m in same["metrics"])

    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    from midlogit.jobs.part_files import read_metadata, read_part, write_part

    for path in (other / "data").glob("*.parquet"):
        table, metadata = read_part(path), read_metadata(path)
        ids = [f"other-{name}" for name in table["row_id"].to_pylist()]
        table = table.set_column(0, table.schema.field(0), [ids])
        write_part(path, tmp_path / "scratch", table, metadata, replace=True)
    found = make_report(runs[0], other).numbers["comparison"]
    assert found["matched"] == 0 and found["texts"] is None
    one, two = values(runs[0]), values(runs[1])
    length = next(m for m in found["metrics"] if m["name"] == "completion_tokens")
    assert length["difference"] == pytest.approx(
        two.completion_tokens.mean() - one.completion_tokens.mean()
    )
    assert {m["test"] for m in found["metrics"]} == {"Welch"}


def test_a_completion_that_occurs_twice_is_refused() -> None:
    import pyarrow as pa

    once = pa.table({"row_id": ["a"], "sample": [0], "number": [0]})
    twice = pa.table({"row_id": ["a", "a"], "sample": [0, 0], "number": [0, 1]})
    with pytest.raises(InvalidRequest, match="twice"):
        match(once, twice)

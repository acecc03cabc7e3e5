"""Summaries of parts merge to the summary of all results, and say what the rows say."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from midlogit import Pair, SamplingParams
from midlogit.jobs.schema import Layout, error_record, record_of, results_table
from midlogit.jobs.summary import merge, summarize

ROWS, N = 6, 2


@pytest.fixture(scope="module")
def results(pair: Pair) -> pa.Table:
    """Completions of six rows with two samples each, the last row an error."""
    layout = Layout("full", 0, pa.schema([]))
    prompts = [f"The fox {row}" for row in range(ROWS - 1)]
    made = pair.generate(prompts, SamplingParams(n=N, max_tokens=12, seed=2), progress=False)
    records = [record_of(completion, 2, layout) for completion in made]
    records += [error_record(sample, 2, "too long", layout) for sample in range(N)]
    texts = pa.array([*prompts, "long"])
    none = pa.nulls(ROWS, pa.string())
    rows = pa.table(
        {
            "row_id": texts,
            "prompt": texts,
            "prompt_form": pa.array(["text"] * ROWS),
            "base_prompt": none,
            "base_prompt_form": none,
        }
    )
    return results_table(rows, [n // N for n in range(ROWS * N)], records, layout)


def test_parts_merge_to_the_whole(results: pa.Table) -> None:
    assert summarize(results.slice((ROWS - 1) * N))["metrics"]["mean_alpha"]["count"] == 0
    whole = summarize(results)
    merged = merge(summarize(results.slice(start, 4)) for start in range(0, ROWS * N, 4))
    assert_same(merged, whole)


def test_the_summary_says_what_the_rows_say(results: pa.Table) -> None:
    summary = summarize(results)
    alpha = np.concatenate([row for row in results.column("alpha").to_pylist() if row])
    assert (summary["completions"], summary["rows"], summary["errors"]) == (ROWS * N, ROWS, N)
    assert summary["error_examples"] == ["too long"] and summary["finish_reasons"]["error"] == N
    assert summary["completion_tokens"] == len(alpha)

    positions = summary["positions"].values()
    assert sum(bin_["tokens"] for bin_ in positions) == len(alpha)
    forced = sum(row[0] for row in results.column("forced").to_pylist() if row)
    sums = [bin_["sums"]["alpha"] for bin_ in positions]
    assert sum(entry["sum"] for entry in sums) == pytest.approx(alpha.sum() - forced, rel=1e-5)
    for name in ("alpha", "log10_kl_base", "entropy"):
        counted = sum(sum(bin_["histograms"][name].values()) for bin_ in positions)
        assert counted == len(alpha) - forced

    lengths = summary["metrics"]["completion_tokens"]
    assert (lengths["count"], lengths["clusters"]) == ((ROWS - 1) * N, ROWS - 1)
    assert lengths["cluster_sizes"] == (ROWS - 1) * N**2

    lists = (results.column(name).to_pylist() for name in ("kl_base", "kl_teacher", "forced"))
    base, teacher, is_forced = (np.concatenate([row for row in rows if row]) for rows in lists)
    kl = np.maximum(base, teacher)[~is_forced]
    found = [place["kl"] for place in summary["highest_kl"]]
    np.testing.assert_allclose(found, np.sort(kl)[::-1][: len(found)])


def assert_same(one: object, other: object) -> None:
    """Equal values, floats to rounding."""
    if isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert isinstance(other, list) and len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
    else:
        assert one == other

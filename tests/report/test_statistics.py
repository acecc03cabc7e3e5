"""Intervals and tests on simulated runs of which the truth is known, and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from midlogit.jobs.measures import cluster_sums
from midlogit.report.statistics import (
    holm,
    kish_share,
    mean_of,
    paired_difference,
    ratio_difference,
    sign_flips,
    t_quantile,
    two_sided_p,
    welch_difference,
)

PAIRS = 200


def simulated(
    generator: np.random.Generator, rows: int, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """(values, clusters): completions of rows that differ, 1 to `samples` each, skewed as lengths are."""
    counts = generator.integers(1, samples + 1, rows)
    cluster = np.repeat(np.arange(rows), counts)
    return np.exp(
        generator.normal(0, 0.7, rows)[cluster] + generator.normal(0, 0.5, len(cluster))
    ), cluster


@pytest.mark.parametrize(("rows", "samples"), [(25, 8), (60, 4), (300, 2)])
def test_intervals_of_runs_without_a_difference_hold_zero(rows: int, samples: int) -> None:
    """Differences have a part of the row's own, so that its samples are no independent draws."""
    generator = np.random.default_rng(0)
    held = rejected = 0
    for seed in range(PAIRS):
        first, cluster = simulated(generator, rows, samples)
        own = generator.normal(0, 0.5, rows)[cluster]
        difference = own + generator.normal(0, 0.5, len(first))
        found = paired_difference(difference, cluster, seed)
        held += found["low"] <= 0 <= found["high"]
        rejected += found["p"] < 0.05
    assert 0.90 * PAIRS <= held <= 0.99 * PAIRS
    assert 0.01 * PAIRS <= rejected <= 0.10 * PAIRS


def test_intervals_of_unmatched_runs_hold_zero() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(PAIRS):
        sums = [cluster_sums(*simulated(generator, rows, 4)) for rows in (60, 90)]
        found = welch_difference(*sums)
        held += found["low"] <= 0 <= found["high"]
    assert 0.90 * PAIRS <= held <= 0.99 * PAIRS


def test_intervals_of_a_mean_hold_it() -> None:
    generator = np.random.default_rng(2)
    true = math.exp((0.7**2 + 0.5**2) / 2)
    held = 0
    for _ in range(PAIRS):
        found = mean_of(cluster_sums(*simulated(generator, 200, 4)))
        assert found.low is not None and found.high is not None
        held += found.low <= true <= found.high
    assert 0.90 * PAIRS <= held <= 0.99 * PAIRS


def test_differences_of_curves_hold_zero() -> None:
    generator = np.random.default_rng(3)
    held = 0
    for _ in range(PAIRS):
        counts = generator.integers(1, 30, (2, 80)).astype(float)
        level = generator.normal(0, 0.1, 80)
        sums = [counts[k] * (0.5 + level + generator.normal(0, 0.2, 80)) for k in range(2)]
        difference, error = ratio_difference((sums[0], counts[0]), (sums[1], counts[1]))
        assert error is not None
        held += abs(difference) <= t_quantile(79) * error
    assert 0.90 * PAIRS <= held <= 0.99 * PAIRS


def test_a_difference_is_found() -> None:
    generator = np.random.default_rng(4)
    cluster = np.repeat(np.arange(40), 4)
    found = paired_difference(0.3 + generator.normal(0, 0.5, 160), cluster)
    assert found["low"] > 0 and found["p"] < 0.01 and found["test"] == "sign flips"
    assert paired_difference(np.zeros(160), cluster)["p"] == 1
    assert paired_difference(np.ones(4), np.zeros(4, int))["low"] is None, "one row has no interval"


def test_against_scipy() -> None:
    for freedom in (1, 2, 3, 7, 30, 199, 201, 5000):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-8)
        for t in (0.0, 0.4, 2.0, -4.0):
            assert two_sided_p(t, freedom) == pytest.approx(
                2 * stats.t.sf(abs(t), freedom), abs=2e-6
            )

    sums = np.random.default_rng(5).normal(0.4, 1, 10)
    exact = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=10_000)
    assert sign_flips(sums) == pytest.approx(exact.pvalue)
    assert sign_flips(np.repeat(sums, 4) * 0.5) == pytest.approx(
        stats.ttest_1samp(np.repeat(sums, 4), 0).pvalue, abs=0.02
    )

    p = [0.01, None, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    weights = np.array([0.1, 2.0, 0.5])
    assert kish_share(math.log(weights.sum()), math.log((weights**2).sum()), 3) == pytest.approx(
        weights.sum() ** 2 / (weights**2).sum() / 3
    )

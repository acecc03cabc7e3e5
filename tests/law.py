"""Whether samples follow a law, or two samples the same one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

LEAST = 5  # expected counts below this are pooled


def chi_square_p(outcomes: Sequence[int] | np.ndarray, q: Sequence[float]) -> float:
    """p-value of drawn outcomes under q, rare ones pooled."""
    counts, expected = np.bincount(outcomes, minlength=len(q)), np.asarray(q) * len(outcomes)
    assert not counts[expected == 0].any(), "an outcome without mass was drawn"
    rare = expected < LEAST
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    keep = wanted > 0
    return float(stats.chisquare(observed[keep], wanted[keep] * (observed.sum() / wanted.sum())).pvalue)


def two_sample_p(first: Sequence[int], second: Sequence[int]) -> float:
    """p-value of two samples of outcomes under one unknown law, rare ones pooled."""
    width = 1 + max(*first, *second)
    counts = np.array([np.bincount(sample, minlength=width) for sample in (first, second)])
    rare = counts.sum(axis=0) < 2 * LEAST
    pooled = np.column_stack([counts[:, ~rare], counts[:, rare].sum(axis=1)])
    return float(stats.chi2_contingency(pooled[:, pooled.sum(axis=0) > 0]).pvalue)

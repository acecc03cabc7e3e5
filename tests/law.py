"""Whether samples follow a distribution, or two samples the same one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from midlogit import Pair, SamplingParams

LONGEST = 20  # tokens of a sampled continuation
LEAST = 5  # expected counts below this are pooled


def chi_square_p(outcomes: Sequence[int] | np.ndarray, q: Sequence[float]) -> float:
    """p-value of drawn outcomes under q, rare ones pooled."""
    counts, expected = np.bincount(outcomes, minlength=len(q)), np.asarray(q) * len(outcomes)
    assert not counts[expected == 0].any(), "an outcome without mass was drawn"
    rare = expected < LEAST
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    keep = wanted > 0
    return float(
        stats.chisquare(observed[keep], wanted[keep] * (observed.sum() / wanted.sum())).pvalue
    )


def two_sample_p(first: Sequence[int], second: Sequence[int]) -> float:
    """p-value of two samples of outcomes under one unknown distribution, rare ones pooled."""
    width = 1 + max(*first, *second)
    counts = np.array([np.bincount(sample, minlength=width) for sample in (first, second)])
    rare = counts.sum(axis=0) < 2 * LEAST
    pooled = np.column_stack([counts[:, ~rare], counts[:, rare].sum(axis=1)])
    return float(stats.chi2_contingency(pooled[:, pooled.sum(axis=0) > 0]).pvalue)


def continuations(pair: Pair, seed: int, runs: int, together: int = 250) -> list[list[int]]:
    """Sampled token ids of one prompt, in waves that begin together: an engine drafts when no prompt waits."""
    found = []
    for wave in range(runs // together):
        asked = SamplingParams(seed=1000 * seed + wave, max_tokens=LONGEST, n=together)
        found += [c.token_ids for c in pair.generate(["Do lions live in caves?"], asked, chat=True)]
    return found


def same_law_ps(first: list[list[int]], second: list[list[int]]) -> dict[str, float]:
    """p-values of two samples of continuations: their lengths, and the tokens at positions 1, 5 and 20."""
    ps = {"length": two_sample_p(*([len(ids) for ids in found] for found in (first, second)))}
    for position in (1, 5, LONGEST):
        tokens = (
            [ids[position - 1] + 1 if len(ids) >= position else 0 for ids in found]
            for found in (first, second)
        )
        ps[f"position {position}"] = two_sample_p(*tokens)
    return ps

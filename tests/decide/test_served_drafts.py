"""A server drafts from all its ids and lists some of them: the drawn tokens still follow r exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import FixedAlpha
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide.base import Draft, RowSettings
from midlogit.decide.truncated.lists import TopLogprobs
from midlogit.decide.truncated.rows import decide_truncated, sample_truncated
from tests.rows import row_settings

RUNS = 50_000
SERVED, VOCABULARY, K = 32, 30, 10  # the last two ids are padding that only the server knows
OUTCOMES = Outcomes(masked_ids=(3, 8), stop_ids=(5, 0, 11))
PLAIN = row_settings(outcomes=OUTCOMES, alpha_tol=1e-6, uniforms=TokenUniforms(0.0, 0.0, 0.0))
CASES = {
    "cool": replace(PLAIN, temperature=0.7),
    "hot, support": replace(PLAIN, temperature=1.3, top_p=0.8),
    "forced, support": replace(PLAIN, forced=True, top_p=0.95),
    "no end yet, alone": replace(PLAIN, may_end=False, outcomes=replace(OUTCOMES, merge=False)),
    "fixed alpha": replace(PLAIN, rule=FixedAlpha(0.3), temperature=1.3),
}


def rows(seed: int) -> tuple[np.ndarray, TopLogprobs, TopLogprobs]:
    """The base's log-probabilities, and what both list: the base some masked and padding ids, and some stop ids."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=SERVED) * 1.5
    teacher = base + rng.normal(size=SERVED)
    base[[3, 5, 11, 30]] += 1.5
    lists = []
    for logits in (base, teacher):
        logprobs = logits - np.log(np.exp(logits).sum())
        best = np.argsort(-logprobs)[:K]
        lists.append(
            TopLogprobs(
                {int(i): float(logprobs[i]) for i in best}, float(logprobs[best[-1]]), SERVED
            )
        )
    base_logprobs = base - np.log(np.exp(base).sum())
    # The base was asked to score what only the teacher lists: known, but never drafted.
    scored = {i: float(base_logprobs[i]) for i in lists[1].logprobs}
    return base_logprobs, replace(lists[0], logprobs=lists[0].logprobs | scored), lists[1]


def drawn(
    settings: RowSettings, seed: int, probs: Mapping[int, float], sampled: np.ndarray
) -> np.ndarray:
    """Counts of the drawn outcomes in RUNS runs, with drafts as the server sampled them."""
    _, base, teacher = rows(seed)
    rng = np.random.default_rng(seed + 1)
    drafts = {i: Draft(i, probs) for i in probs}
    asked = [
        replace(settings, uniforms=TokenUniforms(*three), draft=drafts.get(token_id))
        for three, token_id in zip(rng.random((RUNS, 3)).tolist(), sampled.tolist(), strict=True)
    ]
    tokens = sample_truncated([(base, teacher)] * RUNS, asked, VOCABULARY).token_ids
    return np.bincount([settings.outcomes.outcome_of(i) for i in tokens], minlength=VOCABULARY)


def p_value(settings: RowSettings, seed: int, *, conditioned: bool = True) -> float:
    """p-value of the drawn outcomes under r as `decide_truncated` reports it."""
    base_logprobs, base, teacher = rows(seed)
    weights = np.exp(base_logprobs / settings.temperature)
    weights /= weights.sum()
    listed = [int(i) for i in np.argsort(-base_logprobs)[:K]]
    total = weights[listed].sum() if conditioned else 1.0
    sampled = np.random.default_rng(seed + 2).choice(SERVED, RUNS, p=weights)
    counts = drawn(settings, seed, {i: float(weights[i] / total) for i in listed}, sampled)
    top = decide_truncated([(base, teacher)], [replace(settings, top_logprobs=SERVED)], VOCABULARY)[
        0
    ].top
    r = np.zeros(VOCABULARY)
    for token_id, logprob in top.q:
        r[token_id] = np.exp(logprob)
    assert r.sum() == pytest.approx(1) and not counts[r == 0].any()
    rare = r * RUNS < 5
    expected, found = (np.append(x[~rare], x[rare].sum()) for x in (r * RUNS, counts))
    some = expected > 0
    return float(chisquare(found[some], expected[some] * found.sum() / expected[some].sum()).pvalue)


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_distributed_as_in_lock_step(case: str) -> None:
    assert p_value(CASES[case], seed=len(case)) > 1e-3


def test_draft_probs_that_forget_the_list_fail() -> None:
    hot = replace(PLAIN, temperature=1.3)
    assert p_value(hot, seed=1) > 1e-3
    assert p_value(hot, seed=1, conditioned=False) < 1e-6


def test_rows_with_and_without_drafts_share_a_draw() -> None:
    _, base, teacher = rows(7)
    rng = np.random.default_rng(7)
    probs = {1: 0.5, 2: 0.5}
    some = [replace(PLAIN, uniforms=TokenUniforms(*c)) for c in rng.random((40, 3)).tolist()]
    mixed = [replace(s, draft=Draft(1 + n % 2, probs)) if n % 3 else s for n, s in enumerate(some)]
    together = sample_truncated([(base, teacher)] * 40, mixed, VOCABULARY).token_ids
    alone = [sample_truncated([(base, teacher)], [s], VOCABULARY).token_ids[0] for s in mixed]
    assert together == alone

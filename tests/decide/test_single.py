"""A single pair of lists is sampled on floats as it is among others on arrays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples

from midlogit import EqualKL, FixedAlpha, KLBudget
from midlogit.core import draw, mixture, solver
from midlogit.core.mixture import LogPair, normalise
from midlogit.core.outcomes import Outcomes
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide.base import Draft, RowSettings
from midlogit.decide.truncated import rows as truncated_rows
from midlogit.decide.truncated import single
from midlogit.decide.truncated.lists import TopLogprobs, unlisted_ids
from midlogit.decide.truncated.rows import sample_truncated
from midlogit.decide.truncated.single import moments, solve
from tests.rows import row_pairs, row_settings

SIZE, VOCABULARY, K = 60, 58, 8
MERGED = Outcomes(masked_ids=(3, 11, 59), stop_ids=(0, 1, 20), stop_token_ids=(7,))
OWN = Outcomes(masked_ids=(3,), stop_ids=(0, 20, 59))  # 59 is of one model alone
BASES = replace(OWN, stop_id="base")
APART = Outcomes(masked_ids=(3,), stop_ids=(0, 1), merge=False)
BARE = Outcomes()


def lists(rng: np.random.Generator, settings: RowSettings) -> tuple[TopLogprobs, TopLogprobs]:
    """The most likely ids of two models that agree more or less, with what one lacks scored or not, some at −∞."""
    shared = rng.normal(size=SIZE) * rng.choice([0.2, 2.0, 8.0])
    rows = [shared + rng.normal(size=SIZE) * rng.choice([0.0, 0.5, 3.0]) for _ in range(2)]
    for row in rows:
        if rng.random() < 0.15:
            row[rng.integers(SIZE, size=120)] = -np.inf
    if rng.random() < 0.4:
        one = rng.integers(2)
        rows[one] = rows[one][:VOCABULARY]
        rows[1 - one][59] += 12
        rows[one][20] += 12
    whole = [row - np.logaddexp.reduce(row) for row in rows]
    k = SIZE if rng.random() < 0.1 else K
    tops = [np.argsort(-row, kind="stable")[:k].tolist() for row in whole]
    pair = [
        TopLogprobs({i: float(row[i]) for i in ids}, float(row[ids[-1]]), len(row))
        for row, ids in zip(whole, tops, strict=True)
    ]
    if rng.random() < 0.7:
        wanted = unlisted_ids(pair[0], pair[1], settings, VOCABULARY)
        pair = [
            replace(one, logprobs=one.logprobs | {i: float(row[i]) for i in ids})
            for one, row, ids in zip(pair, whole, wanted, strict=True)
        ]
    return pair[0], pair[1]


def some_settings(rng: np.random.Generator) -> RowSettings:
    return row_settings(
        rule=[EqualKL(), FixedAlpha(0.4), KLBudget(0.05)][rng.integers(3)],
        outcomes=[MERGED, OWN, BASES, APART, BARE][rng.integers(5)],
        temperature=float(rng.choice([0.0, 0.3, 1.0, 1.0, 1.6])),
        top_p=[None, 0.5, 0.9, 0.99, 1.0][rng.integers(5)],
        alpha_tol=1e-9,
        forced=rng.random() < 0.1,
        may_end=rng.random() < 0.7,
        uniforms=TokenUniforms(*rng.random(4).tolist()),
    )


def drafted(rng: np.random.Generator, base: TopLogprobs) -> Draft:
    ids = list(base.logprobs)[:K]
    weights = np.exp([base.logprobs[i] for i in ids]) + 1e-12
    probs = dict(zip(ids, (weights / weights.sum()).tolist(), strict=True))
    return Draft(int(rng.choice(ids, p=weights / weights.sum())), probs)


@pytest.mark.parametrize("seed", range(4))
def test_alone_as_among_others(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    if seed % 2:  # ids in several blocks
        for module in (draw, single):
            monkeypatch.setattr(module, "IDS_PER_BLOCK", 16)
    ends: Counter[str] = Counter()
    for _ in range(1500):
        settings = some_settings(rng)
        pair = lists(rng, settings)
        if settings.temperature and rng.random() < 0.3:
            settings = replace(settings, draft=drafted(rng, pair[0]))
        alone = sample_truncated([pair], [settings], VOCABULARY)
        with monkeypatch.context() as patched:
            patched.setattr(truncated_rows, "MAX_SCALAR_IDS", 0)
            among = sample_truncated([pair], [settings], VOCABULARY)
        assert alone.token_ids == among.token_ids
        (ours,), (theirs,) = alone.decisions(), among.decisions()
        assert ours == theirs
        token_id = alone.token_ids[0]
        ends[
            "empty"
            if token_id is None
            else "stop"
            if token_id in settings.outcomes.merged_stops
            else "token"
        ] += 1
        ends["own stop"] += token_id == 59
        ends["bounded"] += ours.base_bounded or ours.teacher_bounded
        ends["fallback"] += ours.fallback
        ends["drafted"] += settings.draft is not None
    assert (
        min(ends[name] for name in ("token", "stop", "own stop", "fallback", "drafted", "bounded"))
        > 20
    )
    print(ends)


def test_nothing_that_may_be_drawn() -> None:
    settings = replace(
        some_settings(np.random.default_rng(0)), outcomes=Outcomes(masked_ids=tuple(range(SIZE)))
    )
    row = TopLogprobs({1: -0.1, 2: -3.0}, -3.0, SIZE)
    drawn = sample_truncated([(row, row)], [settings], VOCABULARY)
    assert drawn.token_ids == [None] and drawn.decisions()[0].error


@examples(max_examples=100, deadline=None)
@given(rows=row_pairs())
def test_a_row_is_solved_on_floats_as_on_arrays(rows) -> None:
    """Both moments of F and the steps of the solver."""
    base, teacher = (normalise(row[None]) for row in rows)
    pair = LogPair.of(base, teacher)
    if not pair.overlap_N.all():
        return
    common = np.flatnonzero(pair.common_NV[0] > -np.inf)
    log_base, ratio = pair.common_NV[0, common].tolist(), pair.ratio_NV[0, common].tolist()
    largest = float(
        np.max(np.abs(pair.ratio_NV))
    )  # F″ is a difference of numbers of the size of its square
    for one, row in zip(
        moments(log_base, ratio, 0.3), mixture.moments(pair, np.full(1, 0.3)), strict=True
    ):
        np.testing.assert_allclose(one, row[0], rtol=1e-9, atol=1e-12 + 1e-13 * largest**2)
    for rule in (EqualKL(), KLBudget(0.05)):
        expected = solver.solve(rule, pair, 1e-9)[0]
        assert solve(rule, log_base, ratio, 0.0, 1e-9) == pytest.approx(expected, abs=1e-6)

"""The certificate of truncated rows against the full vocabulary that they were cut from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from midlogit.core.bounds import Boxes
from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import AlphaRule, EqualKL, FixedAlpha, KLBudget
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide.arrays import decide
from midlogit.decide.base import RowSettings
from midlogit.decide.truncated.lists import TopLogprobs, unlisted_ids
from midlogit.decide.truncated.rows import decide_truncated
from midlogit.outputs import Decision
from tests.rows import row_settings

V = 300
RULES = (EqualKL(), FixedAlpha(0.3), KLBudget(0.05), KLBudget(0.002))
PLAIN = Outcomes()
MASKED = Outcomes(masked_ids=(3, 4, 7, 290), stop_ids=(0, 1, 2))


def settings(rule: AlphaRule = RULES[0], **changes: object) -> RowSettings:
    fixed = {"alpha_tol": 1e-9, "uniforms": TokenUniforms(0.4, 0.5, 0.4), "top_logprobs": V}
    return row_settings(rule=rule, **fixed | changes)


def row_pairs(n: int, seed: int, sharpness: float = 2.5) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of two related models, some rows peaked and some flat."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, V)) * rng.uniform(0.3, sharpness, size=(n, 1))
    rows = [
        common + rng.normal(size=(n, V)) * rng.uniform(0.05, 1.5, size=(n, 1)) for _ in range(2)
    ]
    base, teacher = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in rows)
    return base, teacher


def listed(row: np.ndarray, k: int) -> TopLogprobs:
    order = np.argsort(-row, kind="stable")[:k]
    return TopLogprobs({int(i): float(row[i]) for i in order}, float(row[order[-1]]), len(row))


def pairs_of(
    base: np.ndarray, teacher: np.ndarray, k: int, score: bool = False
) -> list[tuple[TopLogprobs, TopLogprobs]]:
    pairs = []
    for p, t in zip(base, teacher, strict=True):
        first, second = listed(p, k), listed(t, k)
        if score:
            union = {*first.logprobs, *second.logprobs}
            if not union.isdisjoint(MASKED.stop_ids):
                union |= set(MASKED.stop_ids)
            first = replace(first, logprobs={i: float(p[i]) for i in union})
            second = replace(second, logprobs={i: float(t[i]) for i in union})
        pairs.append((first, second))
    return pairs


def variation(one: Decision, other: Decision) -> float:
    a, b = ({i: np.exp(v) for i, v in d.top.q} for d in (one, other) if d.top)
    return 0.5 * sum(abs(a.get(i, 0) - b.get(i, 0)) for i in {*a, *b})


@pytest.mark.parametrize("score", [False, True])
@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.4])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.spec)
@pytest.mark.parametrize("outcomes", [PLAIN, MASKED], ids=["plain", "masked"])
def test_never_exceeds_its_bounds(
    rule: AlphaRule, temperature: float, top_p: float | None, score: bool, outcomes: Outcomes
) -> None:
    base, teacher = row_pairs(120, seed=1)
    for k, forced, may_end in (
        (5, False, True),
        (20, False, True),
        (20, True, True),
        (20, False, False),
    ):
        rows = [
            settings(
                rule,
                outcomes=outcomes,
                temperature=temperature,
                top_p=top_p,
                forced=forced,
                may_end=may_end,
            )
        ] * 120
        exact = decide(base, teacher, rows)
        cut = decide_truncated(pairs_of(base, teacher, k, score), rows, V)
        for e, c in zip(exact, cut, strict=True):
            assert abs(e.alpha - c.alpha) <= c.alpha_bound + 1e-8
            assert variation(e, c) <= c.tv_bound + 1e-8
            assert 0 <= c.coverage <= 1


def test_a_budget_smaller_than_what_lists_hide_has_a_bound() -> None:
    """Any α might keep it, as far as lists tell; but what lists hide leaves no room to go far from the base."""
    base, teacher = row_pairs(40, seed=3)
    rule = KLBudget(0.002)
    cut = decide_truncated(pairs_of(base, teacher, 200, True), [settings(rule)] * 40, V)
    assert max(1 - c.coverage for c in cut) > 10 * rule.epsilon
    assert max(c.tv_bound for c in cut) < 0.4


def test_whole_lists_are_whole_rows() -> None:
    base, teacher = row_pairs(40, seed=2)
    for top_p in (None, 0.95):
        rows = [
            settings(
                outcomes=MASKED, top_p=top_p, uniforms=TokenUniforms(u, 0.5, u), temperature=0.8
            )
            for u in np.linspace(0, 0.99, 40)
        ]
        exact = decide(base, teacher, rows)
        cut = decide_truncated(pairs_of(base, teacher, V), rows, V)
        for e, c in zip(exact, cut, strict=True):
            assert (c.token_id, c.coverage, c.alpha_bound, c.tv_bound) == (
                e.token_id,
                1.0,
                0.0,
                0.0,
            )
            assert c.alpha == pytest.approx(e.alpha, abs=1e-8)
            assert c.base_logprob == pytest.approx(e.base_logprob)
            assert c.kl_base == pytest.approx(e.kl_base)
            assert [i for i, _ in c.top.base] == [i for i, _ in e.top.base]


def test_scored_support_is_exact() -> None:
    base, teacher = row_pairs(200, seed=3, sharpness=4)
    rows = [settings(outcomes=PLAIN, top_p=0.9)] * 200
    exact = decide(base, teacher, rows)
    cut = decide_truncated(pairs_of(base, teacher, 40, score=True), rows, V)
    sure = [(e, c) for e, c in zip(exact, cut, strict=True) if c.tv_bound == 0]
    assert len(sure) > 50
    for e, c in sure:
        assert variation(e, c) < 1e-9


def test_bounds_are_not_vacuous() -> None:
    base, teacher = row_pairs(300, seed=4, sharpness=4)
    rows = [settings()] * 300
    cut = decide_truncated(pairs_of(base, teacher, 60, score=True), rows, V)
    assert np.median([c.tv_bound for c in cut]) < 0.25
    assert np.median([c.alpha_bound for c in cut]) < 0.25


def test_wider_lists_bound_tighter() -> None:
    base, teacher = row_pairs(50, seed=5)
    medians = []
    for k in (10, 40, 120, V):
        medians.append(
            np.median(
                [
                    c.tv_bound
                    for c in decide_truncated(pairs_of(base, teacher, k), [settings()] * 50, V)
                ]
            )
        )
    assert medians == sorted(medians, reverse=True)
    assert medians[-1] == 0


@pytest.mark.parametrize("score", [False, True])
@pytest.mark.parametrize("top_p", [None, 0.9, 1.0])
@pytest.mark.parametrize("widths", [(V - 2, V), (V, V - 2)], ids=["teacher", "base"])
def test_a_stop_id_that_one_model_alone_has(
    widths: tuple[int, int], top_p: float | None, score: bool
) -> None:
    rows = [row[:, :width] for row, width in zip(row_pairs(120, seed=8), widths, strict=True)]
    for row in rows:
        row[:, [4, V - 2 if row.shape[1] == V else 5]] += 6.0  # ends are likely
        row -= np.log(np.exp(row).sum(axis=-1, keepdims=True))
    outcomes = Outcomes(masked_ids=(3,), stop_ids=(4, V - 2, V - 1))
    for k, temperature, may_end in (
        (8, 1.0, True),
        (20, 0.7, True),
        (20, 1.4, True),
        (20, 1.0, False),
        (V, 1.0, True),
    ):
        asked = [
            settings(
                outcomes=outcomes,
                top_p=top_p,
                temperature=temperature,
                may_end=may_end,
                uniforms=TokenUniforms(u, u, u),
            )
            for u in np.linspace(0, 0.99, 120)
        ]
        lists = [
            (listed(p, min(k, len(p))), listed(t, min(k, len(t))))
            for p, t in zip(*rows, strict=True)
        ]
        if score:
            wanted = [unlisted_ids(*pair, asked[0], V - 2) for pair in lists]
            lists = [
                tuple(
                    replace(one, logprobs=one.logprobs | {i: float(row[n][i]) for i in ids})
                    for one, row, ids in zip(pair, rows, both, strict=True)
                )
                for n, (pair, both) in enumerate(zip(lists, wanted, strict=True))
            ]
        exact, cut = decide(*rows, asked), decide_truncated(lists, asked, V - 2)
        stops = 0
        for e, c in zip(exact, cut, strict=True):
            assert abs(e.alpha - c.alpha) <= c.alpha_bound + 1e-8
            assert variation(e, c) <= c.tv_bound + 1e-8
            stops += c.token_id in outcomes.stop_ids
            if k == V:
                assert (c.token_id, c.tv_bound) == (e.token_id, 0.0)
                assert c.teacher_logprob == pytest.approx(e.teacher_logprob)
        assert stops > 10 if may_end else stops == 0


def test_padding_beyond_the_smaller_vocabulary_is_never_drawn() -> None:
    base, teacher = row_pairs(60, seed=6)
    rows = [settings(uniforms=TokenUniforms(u, 0.5, u)) for u in np.linspace(0, 0.99, 60)]
    base = base - np.log(np.exp(base[:, :100]).sum(axis=-1, keepdims=True))
    cut = decide_truncated(pairs_of(base[:, :100], teacher, 20), rows, 100)
    exact = decide(base[:, :100], teacher, rows)
    for e, c in zip(exact, cut, strict=True):
        assert c.token_id < 100
        assert abs(e.alpha - c.alpha) <= c.alpha_bound + 1e-8
        assert variation(e, c) <= c.tv_bound + 1e-8


def test_phi_over_a_box_is_its_extremes() -> None:
    """(24) against a grid."""
    rng = np.random.default_rng(7)
    ends = np.sort(rng.uniform(0.001, 0.5, size=(40, 2, 2)), axis=-1)
    (a_lo, a_hi), (b_lo, b_hi) = ends[:, 0].T, ends[:, 1].T
    some = np.ones((40, 1), dtype=bool)
    zero = np.zeros(40)
    logs = (np.log(x)[:, None] for x in (a_lo, a_hi, b_lo, b_hi))
    lower, upper = Boxes(*logs, some, some, *[zero] * 6).slope(np.full((40, 1), 0.37))
    grid = np.linspace(0, 1, 60)
    a = a_lo[:, None, None] + grid[None, :, None] * (a_hi - a_lo)[:, None, None]
    b = b_lo[:, None, None] + grid[None, None, :] * (b_hi - b_lo)[:, None, None]
    phi = a**0.63 * b**0.37 * np.log(b / a)
    assert (phi.max(axis=(1, 2)) <= upper[:, 0] + 1e-12).all()
    assert (phi.min(axis=(1, 2)) >= lower[:, 0] - 1e-12).all()
    assert upper[:, 0] == pytest.approx(phi.max(axis=(1, 2)), abs=2e-3)

"""The drawn tokens follow q* as a distribution, with everything switched on; the uniforms are what they claim."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy import stats

from midlogit.core import reference
from midlogit.core.draw import draw_columns
from midlogit.core.noise import IDS_PER_BLOCK
from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import AlphaRule, FixedAlpha, KLBudget
from midlogit.core.uniforms import BLOCK, TokenUniforms, Uniforms, identity
from midlogit.decide.arrays import decide
from midlogit.outputs import Decision
from tests.law import chi_square_p
from tests.rows import row_settings

DRAWS = 20_000
VOCABULARY = 40
STOPS = (7, 3)


def fixed_rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    base = rng.normal(size=VOCABULARY) * 1.5
    return base, base + rng.normal(size=VOCABULARY)


def draw(outcomes: Outcomes, to_array=torch.from_numpy, **changes):
    """Decisions of DRAWS requests on the same rows, at a fixed seed."""
    uniforms = Uniforms(seed=5, sample=0)
    settings = [
        row_settings(outcomes=outcomes, uniforms=uniforms.at(i), **changes) for i in range(DRAWS)
    ]
    base, teacher = (to_array(np.tile(row, (DRAWS, 1))) for row in fixed_rows())
    return decide(base, teacher, settings)


@pytest.mark.parametrize("to_array", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("changes", "masked", "stops"),
    [
        ({}, (), ()),
        ({"temperature": 0.7}, (), ()),
        ({"temperature": 1.3}, (), ()),
        ({"top_p": 0.8}, (), ()),
        ({}, (), STOPS),
        ({}, (0, 1, 20), ()),
        ({"forced": True, "top_p": 0.95}, (), STOPS),
        ({"temperature": 0.7, "top_p": 0.9}, (0, 1, 20), STOPS),
    ],
    ids=["plain", "cool", "hot", "support", "stops", "masks", "forced", "all"],
)
def test_draws_follow_q(to_array, changes, masked, stops) -> None:
    decisions = draw(Outcomes(masked, stops), to_array, **changes)
    base, teacher = fixed_rows()
    expected = reference.mixture(
        base.tolist(), teacher.tolist(), masked_ids=masked, stop_ids=stops, **changes
    )
    # A drawn stop class is emitted as the teacher's most likely stop id; count it where the reference has it.
    drawn = [STOPS[0] if stops and d.token_id in STOPS else d.token_id for d in decisions]
    assert chi_square_p(drawn, expected.q) > 0.01
    d = decisions[0]
    for name in ("alpha", "kl_base", "kl_teacher", "entropy", "ess_base", "ess_teacher"):
        assert getattr(d, name) == pytest.approx(getattr(expected, name), abs=1e-6), name


def test_the_chi_square_test_can_fail() -> None:
    """Draws at a slightly different temperature are told apart from q*."""
    base, teacher = fixed_rows()
    expected = reference.mixture(base.tolist(), teacher.tolist(), temperature=1.08)
    assert chi_square_p([d.token_id for d in draw(Outcomes())], expected.q) < 1e-4


@pytest.mark.parametrize(
    ("rule", "check"),
    [
        (FixedAlpha(0.25), lambda p, t: 0.25),
        (KLBudget(0.02), lambda p, t: reference.kl_budget(p, t, 0.02)),
    ],
    ids=["fixed", "budget"],
)
def test_draws_follow_the_other_rules(rule: AlphaRule, check) -> None:
    base, teacher = fixed_rows()
    expected = reference.mixture(base.tolist(), teacher.tolist(), rule=check)
    assert chi_square_p([d.token_id for d in draw(Outcomes(), rule=rule)], expected.q) > 0.01


def test_the_recorded_logprobs_are_those_of_the_drawn_token() -> None:
    masked, changes = (0, 1, 20), {"temperature": 0.7}
    base, teacher = fixed_rows()
    expected = reference.mixture(
        base.tolist(), teacher.tolist(), masked_ids=masked, stop_ids=STOPS, **changes
    )
    raw_base, raw_teacher = reference.softmax(base.tolist()), reference.softmax(teacher.tolist())
    seen = set()
    for d in draw(Outcomes(masked, STOPS), **changes):
        if d.token_id in seen:
            continue
        seen.add(d.token_id)
        outcome, ids = (STOPS[0], STOPS) if d.token_id in STOPS else (d.token_id, (d.token_id,))
        assert d.logprob == pytest.approx(np.log(expected.q[outcome]))
        assert d.base_logprob == pytest.approx(np.log(sum(raw_base[i] for i in ids)))
        assert d.teacher_logprob == pytest.approx(np.log(sum(raw_teacher[i] for i in ids)))
    assert set(STOPS) & seen == {max(STOPS, key=lambda i: teacher[i])}


def test_greedy_takes_the_most_likely_token_of_q_at_temperature_one() -> None:
    base, teacher = fixed_rows()
    expected = reference.mixture(base.tolist(), teacher.tolist())
    assert {d.token_id for d in draw(Outcomes(), temperature=0.0)} == {int(np.argmax(expected.q))}


def test_greedy_ties_go_to_the_lowest_id() -> None:
    rows = np.zeros((1, 6))
    uniforms = TokenUniforms(0.9, 0.9, 0.9)
    settings = [
        row_settings(outcomes=Outcomes((0,)), temperature=0.0, top_p=0.9, uniforms=uniforms)
    ]
    assert decide(rows, rows.copy(), settings)[0].token_id == 1


def assert_same(found: Decision, expected: Decision) -> None:
    """Equal but for the rounding of sums over rows padded to another width."""
    for field in fields(Decision):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert a == (pytest.approx(b, abs=1e-12) if isinstance(b, float) else b), field.name


def test_mixed_settings_in_one_batch_equal_each_alone() -> None:
    base, teacher = fixed_rows()
    outcomes, other = Outcomes((1,), STOPS), Outcomes()
    settings = [
        row_settings(outcomes=outcomes, top_p=0.9),
        row_settings(rule=FixedAlpha(0.2), outcomes=other, temperature=0.5, top_logprobs=4),
        row_settings(outcomes=outcomes, temperature=0.0, top_p=0.5, forced=True, may_end=False),
        row_settings(outcomes=other, temperature=1.5, may_end=False),
    ]
    settings = [
        replace(s, uniforms=TokenUniforms(u, 0.9, u))
        for s, u in zip(settings, (0.3, 0.6, 0.1, 0.99), strict=True)
    ]
    batch = decide(np.tile(base, (4, 1)), np.tile(teacher, (4, 1)), settings)
    for found, s in zip(batch, settings, strict=True):
        assert_same(found, decide(base[None], teacher[None], [s])[0])


def test_broken_rows_are_reported_and_leave_the_others_alone() -> None:
    base, teacher = fixed_rows()
    bases = np.tile(base, (5, 1))
    bases[0, 3], bases[1, 3], bases[2, :] = np.nan, np.inf, -np.inf
    settings = [row_settings(top_p=0.95, uniforms=TokenUniforms(0.4, 0.9, 0.4))] * 4
    settings.append(replace(settings[0], outcomes=Outcomes(tuple(range(VOCABULARY)))))
    decisions = decide(bases, np.tile(teacher, (5, 1)), settings)
    assert [d.error is None for d in decisions] == [False, False, False, True, False]
    assert "NaN" in (decisions[0].error or "") and "masked" in (decisions[4].error or "")
    assert_same(decisions[3], decide(base[None], teacher[None], settings[3:4])[0])


def test_disjoint_supports_fall_back_to_the_teacher() -> None:
    base, teacher = np.full((1, 4), -np.inf), np.full((1, 4), -np.inf)
    base[0, :2], teacher[0, 2:] = 0.0, [0.0, 1.0]
    settings = [row_settings(uniforms=TokenUniforms(0.999, 0.9, 0.999))]
    (d,) = decide(base, teacher, settings)
    assert d.token_id in (2, 3)
    assert (d.alpha, d.fallback, d.kl_base) == (1.0, True, np.inf)
    assert d.kl_teacher == pytest.approx(0)


def test_top_logprobs_are_q_and_each_model_alone() -> None:
    base, teacher = fixed_rows()
    masked, top_p = (0,), 0.9
    settings = [row_settings(outcomes=Outcomes(masked), top_p=top_p, top_logprobs=3)]
    top = decide(base[None], teacher[None], settings)[0].top
    expected = reference.mixture(base.tolist(), teacher.tolist(), masked_ids=masked, top_p=top_p)
    assert top is not None
    models = [reference.softmax(row.tolist()) for row in (base, teacher)]
    pairs = zip((top.q, top.base, top.teacher), (expected.q, *models), strict=True)
    for candidates, probabilities in pairs:
        best = np.argsort(-np.asarray(probabilities))[:3]
        assert [i for i, _ in candidates] == best.tolist()
        np.testing.assert_allclose(
            [lp for _, lp in candidates], np.log(np.asarray(probabilities)[best]), atol=1e-8
        )


def wide_masses() -> np.ndarray:
    """Masses of ids in three blocks, few of which have most of it, and many none."""
    rng = np.random.default_rng(2)
    mass = np.where(rng.random(40_000) < 0.3, rng.random(40_000) ** 300, 0.0)
    mass[[5, 6, 20_000, 39_999]] = 20, 40, 30, 15
    return mass


def uniforms_of(draws: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 2**53, draws) / 2**53


@pytest.mark.parametrize("to_array", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_draws_are_in_proportion_to_mass(to_array) -> None:
    mass, uniforms = wide_masses(), uniforms_of(4000)
    drawn = np.concatenate(
        [
            np.asarray(draw_columns(to_array(np.tile(mass, (100, 1))), to_array(some)))
            for some in uniforms.reshape(40, 100)
        ]
    )
    assert chi_square_p(drawn, mass / mass.sum()) > 0.01
    other = np.where(mass == 40, 34, mass)
    assert chi_square_p(drawn, other / other.sum()) < 0.01


def test_lists_draw_what_whole_rows_draw() -> None:
    mass, uniforms = wide_masses(), uniforms_of(200)
    ids = np.append(np.flatnonzero(mass), -1)
    listed = np.tile(np.append(mass[ids[:-1]], 0.0), (200, 1))
    columns = draw_columns(listed, uniforms, np.tile(ids, (200, 1)))
    assert ids[columns].tolist() == draw_columns(np.tile(mass, (200, 1)), uniforms).tolist()


def test_draws_are_the_same_where_rows_hardly_differ() -> None:
    """By inverse CDF a little mass at a low id would move the choice among all ids above it."""
    uniforms = uniforms_of(4000)
    mass = np.full(64, 1 / 64)
    moved = mass.copy()
    moved[[0, -1]] += 0.01, -0.01
    one, other = (draw_columns(np.tile(x, (len(uniforms), 1)), uniforms) for x in (mass, moved))
    assert np.mean(one == other) > 0.97
    one, other = (np.searchsorted(x.cumsum(), uniforms) for x in (mass, moved))
    assert np.mean(one == other) < 0.5


def test_only_what_has_mass_is_drawn() -> None:
    mass = np.zeros((500, 3 * IDS_PER_BLOCK))
    mass[:, [7, 2 * IDS_PER_BLOCK + 1]] = 1.0, 1e-200
    assert set(draw_columns(mass, uniforms_of(500)).tolist()) == {7}
    mass[:, 7] = 0.0
    assert set(draw_columns(mass, uniforms_of(500)).tolist()) == {2 * IDS_PER_BLOCK + 1}
    assert set(draw_columns(np.zeros((3, 5)), uniforms_of(3)).tolist()) == {0}


def test_uniforms_depend_on_their_key_alone() -> None:
    def first(count: int, **key) -> list[float]:
        uniforms = Uniforms(**{"seed": 1, "sample": 0, **key})
        return [uniform for i in range(count) for uniform in uniforms.at(i)]

    long = first(3 * BLOCK)
    backwards = Uniforms(1, 0)
    assert [c for i in reversed(range(3 * BLOCK)) for c in reversed(backwards.at(i))][::-1] == long
    assert len(set(long)) == len(long) and stats.kstest(long, "uniform").pvalue > 0.01
    others = [
        identity([1, 2], [3]),
        identity([1], [2, 3]),
        identity([1, 2], [3], "a"),
        identity([1, 2], [3], "b"),
    ]
    apart = [first(50, identity=name) for name in others]
    assert len({uniform for run in apart for uniform in run}) == len(apart) * len(apart[0])
    for other in ({"seed": 2}, {"sample": 1}, {"seed": 2**40 + 1}, {"identity": others[0]}):
        assert not set(first(50, **other)) & set(long)

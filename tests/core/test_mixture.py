"""α, both KLs and q* against the float64 reference, and the properties that hold whatever the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from midlogit.core import reference
from midlogit.core.diagnostics import diagnose
from midlogit.core.mixture import LogPair, log_mixture, moments, normalise
from midlogit.core.rules import AlphaRule, EqualKL, FixedAlpha, KLBudget
from midlogit.core.solver import solve
from tests.rows import KINDS, make_rows, row_pairs

LIBRARIES = {"numpy": np.asarray, "torch": torch.from_numpy}
library = pytest.mark.parametrize("to_array", LIBRARIES.values(), ids=LIBRARIES.keys())


def mix(base, teacher, rule: AlphaRule = EqualKL(), tolerance: float = 1e-9):
    """(α, q, kl_base, kl_teacher) of one row pair as NumPy."""
    pair = LogPair.of(normalise(base[None, :]), normalise(teacher[None, :]))
    alpha = solve(rule, pair, tolerance)
    log_q = log_mixture(pair, alpha, alpha != alpha)
    facts = diagnose(log_q, pair.base_NV, pair.teacher_NV)
    return tuple(np.asarray(x[0]) for x in (alpha, log_q, facts.kl_base_N, facts.kl_teacher_N))


@library
@settings(max_examples=150, deadline=None)
@given(rows=row_pairs())
def test_float64_agrees_with_the_reference(to_array, rows) -> None:
    base, teacher = rows
    expected = reference.mixture(base.tolist(), teacher.tolist())
    alpha, log_q, kl_base, kl_teacher = mix(to_array(base), to_array(teacher))
    np.testing.assert_allclose(np.exp(log_q), expected.q, atol=1e-6)
    np.testing.assert_allclose(kl_base, expected.kl_base, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(kl_teacher, expected.kl_teacher, rtol=1e-6, atol=1e-6)
    assert abs(alpha - expected.alpha) <= 1e-6 or alpha_is_undetermined(
        base, teacher, np.finfo(np.float64).eps
    )


@library
@settings(max_examples=150, deadline=None)
@given(rows=row_pairs())
def test_float32_agrees_with_the_reference(to_array, rows) -> None:
    base, teacher = (row.astype(np.float32) for row in rows)
    expected = reference.mixture(base.tolist(), teacher.tolist())
    alpha, log_q, kl_base, kl_teacher = mix(to_array(base), to_array(teacher), tolerance=1e-6)
    np.testing.assert_allclose(np.exp(log_q), expected.q, atol=1e-4)
    np.testing.assert_allclose(kl_base, expected.kl_base, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kl_teacher, expected.kl_teacher, rtol=1e-4, atol=1e-4)
    assert abs(alpha - expected.alpha) <= 1e-4 or alpha_is_undetermined(
        base, teacher, np.finfo(np.float32).eps
    )


def alpha_is_undetermined(base, teacher, eps: float) -> bool:
    """Whether rounding the rows moves α by more than the tolerance (docs/theory.md section 4).

    An error of a few eps in each ℓ moves F′ by as much and α by that over F″.
    """
    pair = LogPair.of(*(normalise(x[None, :].astype(np.float64)) for x in (base, teacher)))
    _, _, curvature = moments(pair, solve(EqualKL(), pair, 1e-9))
    scale = max(np.abs(x[np.isfinite(x)]).max() for x in (base, teacher))
    tolerance = 1e-6 if eps < 1e-10 else 1e-4
    return bool(8 * eps * (1 + scale) / max(curvature[0], 1e-300) > tolerance)


@library
@pytest.mark.parametrize("kind", KINDS)
def test_vocabularies_of_real_size(to_array, kind: str) -> None:
    base, teacher = make_rows(kind, 152_000, seed=3)
    alpha, log_q, kl_base, kl_teacher = mix(to_array(base), to_array(teacher))
    # The reference is slow at this size: test its conditions rather than run its bisection.
    p, t = reference.softmax(base.tolist()), reference.softmax(teacher.tolist())
    q, cumulant = reference.geometric(p, t, float(alpha))
    np.testing.assert_allclose(np.exp(log_q), q, atol=1e-9)
    assert abs(reference.slope(p, t, float(alpha))) <= 1e-8 or alpha in (0.0, 1.0)
    np.testing.assert_allclose(kl_base, reference.kl(q, p), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(kl_teacher, reference.kl(q, t), rtol=1e-6, atol=1e-9)
    if 0 < alpha < 1:
        np.testing.assert_allclose(kl_base, -cumulant, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(rows=row_pairs())
def test_exchanging_the_models_turns_alpha_round(rows) -> None:
    base, teacher = rows
    alpha, log_q, kl_base, kl_teacher = mix(base, teacher)
    swapped, swapped_log_q, swapped_kl_base, swapped_kl_teacher = mix(teacher, base)
    np.testing.assert_allclose(np.exp(log_q), np.exp(swapped_log_q), atol=1e-6)
    np.testing.assert_allclose(kl_base, swapped_kl_teacher, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(kl_teacher, swapped_kl_base, rtol=1e-6, atol=1e-6)
    assert abs(alpha - (1 - swapped)) <= 1e-6 or alpha_is_undetermined(
        base, teacher, np.finfo(np.float64).eps
    )


@settings(max_examples=100, deadline=None)
@given(rows=row_pairs(), shift_base=st.floats(-50, 50), shift_teacher=st.floats(-50, 50))
def test_adding_a_constant_changes_nothing(rows, shift_base: float, shift_teacher: float) -> None:
    base, teacher = rows
    alpha, log_q, *kls = mix(base, teacher)
    shifted_alpha, shifted_log_q, *shifted_kls = mix(base + shift_base, teacher + shift_teacher)
    np.testing.assert_allclose(np.exp(log_q), np.exp(shifted_log_q), atol=1e-6)
    np.testing.assert_allclose(kls, shifted_kls, rtol=1e-6, atol=1e-6)
    assert abs(alpha - shifted_alpha) <= 1e-6 or alpha_is_undetermined(
        base, teacher, np.finfo(np.float64).eps
    )


@library
@settings(max_examples=60, deadline=None)
@given(rows=row_pairs(100), epsilon=st.floats(0, 2))
def test_kl_budget_takes_the_largest_alpha_within(to_array, rows, epsilon: float) -> None:
    base, teacher = rows
    p, t = reference.softmax(base.tolist()), reference.softmax(teacher.tolist())
    expected = reference.kl_budget(p, t, epsilon)
    alpha, _, kl_base, _ = mix(to_array(base), to_array(teacher), KLBudget(epsilon))
    q, _ = reference.geometric(p, t, float(alpha))
    assert kl_base <= epsilon + 1e-8 or alpha == 0
    more, _ = reference.geometric(p, t, min(1.0, float(alpha) + 1e-4))
    assert alpha == 1 or reference.kl(more, p) >= epsilon - 1e-8 or reference.kl(more, q) < 1e-12
    assert (
        abs(alpha - expected) < 1e-4
        or reference.kl(reference.geometric(p, t, expected)[0], q) < 1e-9
    )


@library
def test_fixed_alpha_mixes_at_that_alpha(to_array) -> None:
    base, teacher = make_rows("random", 50, seed=1)
    for value in (0.0, 0.3, 1.0):
        alpha, log_q, *_ = mix(to_array(base), to_array(teacher), FixedAlpha(value))
        q, _ = reference.geometric(
            reference.softmax(base.tolist()), reference.softmax(teacher.tolist()), value
        )
        assert alpha == value
        np.testing.assert_allclose(np.exp(log_q), q, atol=1e-12)


@library
def test_equal_rows_give_one_half(to_array) -> None:
    base, _ = make_rows("random", 30, seed=2)
    alpha, log_q, kl_base, kl_teacher = mix(to_array(base), to_array(base.copy()))
    assert alpha == 0.5
    assert abs(kl_base) < 1e-12 and abs(kl_teacher) < 1e-12
    np.testing.assert_allclose(np.exp(log_q), reference.softmax(base.tolist()), atol=1e-12)


def test_rows_do_not_touch_each_other() -> None:
    """A row solved in a batch of hard rows gives the very bits that it gives alone."""
    pairs = [make_rows(kind, 64, seed) for seed in range(4) for kind in KINDS]
    base, teacher = (np.stack(rows) for rows in zip(*pairs, strict=True))
    batch = solve(EqualKL(), LogPair.of(normalise(base), normalise(teacher)), 1e-9)
    alone = [
        solve(EqualKL(), LogPair.of(normalise(b[None]), normalise(t[None])), 1e-9)[0]
        for b, t in pairs
    ]
    np.testing.assert_array_equal(batch, alone)


def test_derivatives_are_those_of_the_cumulant() -> None:
    base, teacher = make_rows("random", 40, seed=5)
    pair = LogPair.of(normalise(base[None]), normalise(teacher[None]))
    step = 1e-5
    for alpha in (0.1, 0.5, 0.9):
        low, _, _ = moments(pair, np.array([alpha - step]))
        value, first, second = moments(pair, np.array([alpha]))
        high, _, _ = moments(pair, np.array([alpha + step]))
        np.testing.assert_allclose(first, (high - low) / (2 * step), rtol=1e-6)
        np.testing.assert_allclose(second, (high - 2 * value + low) / step**2, rtol=1e-3)

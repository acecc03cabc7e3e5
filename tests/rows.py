"""Pairs of rows of logits of every kind the solver can meet, settings for them, and a rule of the tests' own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import AlphaRule, EqualKL
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide.base import RowSettings

KINDS = ("random", "near_equal", "near_disjoint", "one_hot", "holes", "shifted")


def make_rows(kind: str, vocabulary: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(base, teacher) logits in float64."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=vocabulary) * rng.uniform(0.5, 5)
    teacher = base + rng.normal(size=vocabulary) * rng.uniform(0.1, 3)
    if kind == "near_equal":
        teacher = base + rng.normal(size=vocabulary) * 10.0 ** rng.uniform(-7, -2)
    elif kind == "near_disjoint":
        first = rng.random(vocabulary) < 0.5
        base, teacher = base - 60.0 * first, teacher - 60.0 * ~first
    elif kind == "one_hot":
        base[rng.integers(vocabulary)] += rng.uniform(20, 100)
        teacher[rng.integers(vocabulary)] += rng.uniform(0, 100)
    elif kind == "holes":
        base[rng.random(vocabulary) < 0.3] = -np.inf
        teacher[rng.random(vocabulary) < 0.3] = -np.inf
        shared = rng.integers(vocabulary)
        base[shared] = teacher[shared] = 0.0
    elif kind == "shifted":
        base, teacher = base + 1000.0, teacher - 1000.0
    return base, teacher


def row_pairs(most: int = 400) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Hypothesis-made row pairs of 2 to `most` outcomes."""
    return st.builds(
        make_rows, st.sampled_from(KINDS), st.integers(2, most), st.integers(0, 2**32 - 1)
    )


PLAIN = RowSettings(
    rule=EqualKL(),
    outcomes=Outcomes(),
    temperature=1.0,
    top_p=None,
    alpha_tol=1e-8,
    forced=False,
    may_end=True,
    uniforms=TokenUniforms(0.5, 0.5, 0.5),
)


def row_settings(**changes: Any) -> RowSettings:
    """Settings of one row: equal KL on all ids at temperature 1, with these changes."""
    return replace(PLAIN, **changes)


@dataclass(frozen=True, slots=True)
class DoubleKL(AlphaRule):
    """The α where KL(q‖base) = 2 KL(q‖teacher): a rule as a user would define it, with nothing but its formula.

    KL(q‖base) = αF′ − F and KL(q‖teacher) = −(1 − α)F′ − F (docs/theory.md (6)).
    """

    @property
    def spec(self) -> str:
        return "double-kl"

    def residual(self, alpha: Any, F: Any, dF: Any, d2F: Any) -> tuple[Any, Any]:
        return (2 - alpha) * dF + F, (2 - alpha) * d2F

"""Pairs of rows of logits of every kind the solver can meet, from a seed."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

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
    return st.builds(make_rows, st.sampled_from(KINDS), st.integers(2, most), st.integers(0, 2**32 - 1))

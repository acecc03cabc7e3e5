"""Batches that mix every setting, and how close the decision by kernels must come to the float64 one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import AlphaRule, EqualKL, FixedAlpha, KLBudget
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide.base import RowSettings
from midlogit.outputs import Decision, Top
from tests.rows import KINDS, make_rows, row_settings

RULES: tuple[AlphaRule, ...] = (
    EqualKL(),
    EqualKL(),
    FixedAlpha(0.3),
    FixedAlpha(1.0),
    KLBudget(0.1),
)

OF_THE_TOKEN = (
    "token_id", "logprob", "base_logprob", "teacher_logprob", "base_tempered_logprob", "teacher_tempered_logprob",
    "base_support_logprob", "teacher_support_logprob",
)  # fmt: skip
OF_THE_SUPPORT = ("base_support_logmass", "teacher_support_logmass")


def kernel_settings(**changes: Any) -> RowSettings:
    """Settings at the tolerance that requests have."""
    return row_settings(alpha_tol=1e-6, **changes)


def alphabets(vocabulary: int) -> list[Outcomes]:
    """Outcomes of every kind; the last ids and some in the middle are special."""
    last = vocabulary - 1
    return [
        Outcomes(),
        Outcomes(masked_ids=(3, last, 70)),
        Outcomes(masked_ids=(5,), stop_ids=(10, last - 1)),
        Outcomes(masked_ids=(150,), stop_ids=(150, 4, 151)),
        Outcomes(stop_ids=(7,), stop_token_ids=(9,)),
        Outcomes(stop_ids=(4, 150, 151), merge=False),
        Outcomes(masked_ids=(5,), stop_ids=(10, last - 1, 200), stop_id="base"),
    ]


def mixed_settings(rows: int, vocabulary: int, rng: np.random.Generator) -> list[RowSettings]:
    """Rows with random settings, of all that a request may have."""
    outcomes = alphabets(vocabulary)
    return [
        kernel_settings(
            rule=RULES[rng.integers(len(RULES))],
            outcomes=outcomes[rng.integers(len(outcomes))],
            temperature=float(rng.choice([0.0, 1.0, 1.0, 0.5, 1.7])),
            top_p=[None, 0.5, 0.95, 0.999][rng.integers(4)],
            forced=bool(rng.random() < 0.15),
            may_end=bool(rng.random() < 0.7),
            uniforms=TokenUniforms(*rng.random(4).tolist()),
        )
        for _ in range(rows)
    ]


def listing(settings: list[RowSettings]) -> list[RowSettings]:
    """The same rows, of which all but every fifth list candidates, as many as differ from row to row."""
    return [replace(s, top_logprobs=(1, 5, 0, 20, 32)[i % 5]) for i, s in enumerate(settings)]


def make_batch(rows: int, vocabulary: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of every kind of tests/rows.py, float64."""
    pairs = [make_rows(KINDS[i % len(KINDS)], vocabulary, 1000 * seed + i) for i in range(rows)]
    return tuple(torch.tensor(np.array(side)) for side in zip(*pairs, strict=True))  # type: ignore[return-value]


def assert_agree(found: Decision, truth: Decision, where: str = "") -> None:
    """α to 1e-4, KLs and the rest to 1e-4 relative, the same token.

    Rows that agree to the last digits do not determine α (docs/theory.md section 4.3): the same q is enough.
    """
    assert found.error == truth.error, where
    if truth.error is not None:
        return
    for name in ("forced", "fallback", "constrained"):
        assert getattr(found, name) == getattr(truth, name), (where, name)
    if not truth.kl_base + truth.kl_teacher < 1e-10:
        assert abs(found.alpha - truth.alpha) <= 1e-4, (where, found, truth)
    for name, least in (
        ("kl_base", 1e-11), ("kl_teacher", 1e-11), ("entropy", 1e-6), ("ess_base", 1e-30), ("ess_teacher", 1e-30),
    ):  # fmt: skip
        a, b = getattr(found, name), getattr(truth, name)
        assert math.isclose(a, b, rel_tol=1e-4, abs_tol=least), (where, name, found, truth)
    assert found.token_id == truth.token_id, (where, found, truth)
    for name in OF_THE_TOKEN[1:] + OF_THE_SUPPORT:
        a, b = getattr(found, name), getattr(truth, name)
        # The mass of a support moves with an id at its edge: 1.2e-4 in 151,936 float32 logits.
        assert math.isclose(a, b, rel_tol=1e-5, abs_tol=3e-4), (where, name, found, truth)


def assert_top(found: Top, everything: Top, count: int, where: str = "") -> None:
    """The first `count` ids of each full list, up to ids that are as likely, with their log-probabilities.

    Of ids with the same one the lowest come first.
    """
    for name in ("q", "base", "teacher"):
        some, every = getattr(found, name), getattr(everything, name)
        known = dict(every)
        assert len(some) == min(count, len(every)), (where, name)
        for (token_id, logprob), (_, expected) in zip(some, every, strict=False):
            assert math.isclose(logprob, expected, rel_tol=1e-5, abs_tol=3e-4), (where, name)
            assert math.isclose(known[token_id], expected, rel_tol=1e-6, abs_tol=1e-5), (
                where,
                name,
            )
        assert some == sorted(some, key=lambda one: (-one[1], one[0])), (where, name)

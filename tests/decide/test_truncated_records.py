"""What a trainer is told of a draw from top-k lists: exact where they show it, bounded where they do not."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np

from midlogit.core.outcomes import Outcomes
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide.arrays import decide
from midlogit.decide.base import RowSettings
from midlogit.decide.truncated.lists import TopLogprobs, unlisted_ids
from midlogit.decide.truncated.rows import decide_truncated
from midlogit.outputs import Decision
from tests.rows import row_settings

V, K = 300, 12
STOPS = (9, 30, 200)
OUTCOMES = (
    Outcomes((3,), STOPS, stop_id="base"),
    Outcomes((3,), STOPS),
    Outcomes((3, 17)),
)
EXACT = 1e-9


def some_row(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of both models, the stop ids likely."""
    base = rng.normal(size=V) * 3
    teacher = base + rng.normal(size=V)
    base[9], teacher[30] = base.max(), teacher.max() + 1
    return tuple(x - np.logaddexp.reduce(x) for x in (base, teacher))  # type: ignore[return-value]


def listed(
    rows: tuple[np.ndarray, np.ndarray], settings: RowSettings, k: int, *, scored: bool
) -> tuple[TopLogprobs, TopLogprobs]:
    def top(row: np.ndarray) -> TopLogprobs:
        ids = np.argsort(-row)[:k]
        return TopLogprobs({int(i): float(row[i]) for i in ids}, float(row[ids[-1]]), V)

    found = top(rows[0]), top(rows[1])
    if scored:
        wanted = unlisted_ids(*found, settings, V)
        found = tuple(  # type: ignore[assignment]
            replace(one, logprobs=one.logprobs | {i: float(row[i]) for i in ids})
            for one, row, ids in zip(found, rows, wanted, strict=True)
        )
    return found


def assert_honest(found: Decision, rows: tuple[np.ndarray, np.ndarray], T: float) -> None:
    """The tempered log-probabilities are within their bounds, and those of an outcome agree with each other."""
    for side, row in zip(("base", "teacher"), rows, strict=True):
        true = row[found.token_id] / T - np.logaddexp.reduce(row / T)
        own, bound = (getattr(found, f"{side}_tempered_{x}") for x in ("logprob", "bound"))
        assert abs(own - true) <= bound + EXACT
        if T == 1:
            assert bound in (0.0, math.inf)
        if found.token_id not in STOPS:
            inside, mass = (getattr(found, f"{side}_support_log{x}") for x in ("prob", "mass"))
            assert math.isclose(own, inside + mass, abs_tol=1e-9) or bound == math.inf


def test_lists_tell_what_they_know() -> None:
    rng = np.random.default_rng(1)
    bounds: list[float] = []
    for outcomes, T, top_p, scored in itertools.product(
        OUTCOMES, (1.0, 0.7, 1.5), (None, 0.9), (True, False)
    ):
        for _ in range(12):
            rows = some_row(rng)
            settings = row_settings(
                outcomes=outcomes, temperature=T, top_p=top_p,
                uniforms=TokenUniforms(*rng.random(4).tolist()),
            )  # fmt: skip
            (found,) = decide_truncated([listed(rows, settings, K, scored=scored)], [settings], V)
            assert_honest(found, rows, T)
            bounds.append(found.base_tempered_bound)
            assert not scored or found.base_tempered_bound < math.inf
    assert 0.0 in bounds and math.inf in bounds and any(0 < b < 0.5 for b in bounds)


def test_whole_lists_are_whole_rows() -> None:
    """Lists of every id say what whole rows say, and draw the same ids."""
    rng = np.random.default_rng(2)
    for outcomes, T, top_p in itertools.product(OUTCOMES, (1.0, 0.7, 0.0), (None, 0.9)):
        for _ in range(6):
            rows = some_row(rng)
            settings = row_settings(
                outcomes=outcomes, temperature=T, top_p=top_p, return_support=top_p is not None,
                uniforms=TokenUniforms(*rng.random(4).tolist()),
            )  # fmt: skip
            (whole,) = decide(rows[0][None], rows[1][None], [settings])
            (found,) = decide_truncated([listed(rows, settings, V, scored=False)], [settings], V)
            assert (found.token_id, found.support) == (whole.token_id, whole.support)
            for name in (
                "logprob", "base_tempered_logprob", "teacher_tempered_logprob", "base_support_logprob",
                "teacher_support_logprob", "base_support_logmass", "teacher_support_logmass",
            ):  # fmt: skip
                ours, theirs = getattr(found, name), getattr(whole, name)
                assert math.isclose(ours, theirs, abs_tol=1e-6), name
            assert found.base_tempered_bound == found.teacher_tempered_bound == 0.0

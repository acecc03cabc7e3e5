"""Masks, the merged stop class and the alignment of two vocabularies."""

from __future__ import annotations

import numpy as np
import pytest

from midlogit import PairMismatch
from midlogit.core.outcomes import Outcomes
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide.arrays import decide
from midlogit.models.alignment import align, require_mixable
from tests.rows import row_settings


def stop_probability(outcomes: Outcomes) -> float:
    """q of all stop ids where base and teacher each stop with 0.3 on an id of their own."""
    base, teacher = (np.log(np.array([[0.7 - 1e-7, 0.3, 1e-7]])) for _ in range(2))
    teacher = teacher[:, [0, 2, 1]]
    settings = [row_settings(outcomes=outcomes, alpha_tol=1e-9, top_logprobs=3)]
    top = decide(base, teacher, settings)[0].top
    assert top is not None
    return float(sum(np.exp(lp) for i, lp in top.q if i in (1, 2)))


def test_merging_keeps_the_stop_probability_that_mixing_alone_destroys() -> None:
    assert stop_probability(Outcomes(stop_ids=(1, 2))) == pytest.approx(0.3, abs=1e-6)
    assert stop_probability(Outcomes(stop_ids=(1, 2), merge=False)) < 1e-3


def test_ending_ids_are_held_back_where_the_row_may_not_end() -> None:
    logits = np.log(np.array([[0.1, 0.4, 0.4, 0.1]]))
    outcomes = Outcomes(stop_ids=(1,), stop_token_ids=(2,))
    for uniform in (0.0, 0.3, 0.6, 0.999):
        uniforms = TokenUniforms(uniform, 0.5, uniform)
        settings = [row_settings(outcomes=outcomes, may_end=False, uniforms=uniforms)]
        assert decide(logits, logits.copy(), settings)[0].token_id in (0, 3)


def test_align_drops_padding_and_masks_what_differs() -> None:
    base = {0: "a", 1: "b", 2: "c", 4: "e"}
    teacher = {0: "a", 1: "x", 2: "c", 3: "d"}
    alignment = align(base, teacher, base_size=8, teacher_size=5)
    assert (alignment.size, alignment.shared) == (5, 3)
    assert alignment.differing == {1: ("b", "x")}
    assert alignment.masked_ids == (1, 3, 4)


def test_more_than_one_percent_of_differing_ids_is_refused() -> None:
    base = {i: f"t{i}" for i in range(1000)}
    few = base | dict.fromkeys(range(10), "other")
    many = base | dict.fromkeys(range(11), "other")
    require_mixable(align(base, few, 1000, 1000))
    with pytest.raises(
        PairMismatch, match=r"11 of 1000 shared ids differ \(0: 't0' / 'other', 1: 't1'"
    ):
        require_mixable(align(base, many, 1000, 1000))
    with pytest.raises(PairMismatch):
        require_mixable(align({0: "a"}, {1: "a"}, 2, 2))

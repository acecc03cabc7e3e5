"""A rule for α that is defined outside the package, by its formula alone, works wherever a rule does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from midlogit import Pair, SamplingParams
from midlogit.core import reference
from midlogit.core.outcomes import Outcomes
from midlogit.core.uniforms import Uniforms
from midlogit.decide.arrays import decide
from midlogit.decide.truncated.lists import TopLogprobs
from midlogit.decide.truncated.rows import decide_truncated, sample_truncated
from tests.law import chi_square_p
from tests.rows import DoubleKL, make_rows, row_settings

VOCABULARY = 40
OUTCOMES = Outcomes(masked_ids=(5,), stop_ids=(7, 3))


def double_kl(p: list[float], t: list[float]) -> float:
    """The rule by bisection on both divergences."""

    def excess(alpha: float) -> float:
        q, _ = reference.geometric(p, t, alpha)
        return reference.kl(q, p) - 2 * reference.kl(q, t)

    return reference.increasing_root(excess)


def log_probs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    base, teacher = make_rows("random", VOCABULARY, seed)
    return base - np.logaddexp.reduce(base), teacher - np.logaddexp.reduce(teacher)


def top(row: np.ndarray, k: int) -> TopLogprobs:
    ids = np.argsort(-row, kind="stable")[:k]
    return TopLogprobs({int(i): float(row[i]) for i in ids}, float(row[ids[-1]]), VOCABULARY)


@pytest.mark.parametrize("to_array", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("top_p", [None, 0.8])
def test_whole_rows_follow_the_rule(to_array, top_p: float | None) -> None:
    base, teacher = log_probs(1)
    uniforms = Uniforms(seed=5, sample=0)
    asked = [
        row_settings(rule=DoubleKL(), outcomes=OUTCOMES, top_p=top_p, uniforms=uniforms.at(i))
        for i in range(5000)
    ]
    decisions = decide(*(to_array(np.tile(row, (5000, 1))) for row in (base, teacher)), asked)

    expected = reference.mixture(
        base.tolist(),
        teacher.tolist(),
        masked_ids=(5,),
        stop_ids=(7, 3),
        top_p=top_p,
        rule=double_kl,
    )
    assert decisions[0].alpha == pytest.approx(expected.alpha, abs=1e-7)
    assert decisions[0].kl_base == pytest.approx(2 * decisions[0].kl_teacher, abs=1e-7)
    assert chi_square_p([OUTCOMES.outcome_of(d.token_id) for d in decisions], expected.q) > 0.01


def test_truncated_rows_follow_the_rule_within_its_bounds() -> None:
    rows = [log_probs(seed) for seed in range(60)]
    base, teacher = (np.stack(side) for side in zip(*rows, strict=True))
    asked = [
        row_settings(rule=DoubleKL(), outcomes=OUTCOMES, uniforms=Uniforms(n, 0).at(0))
        for n in range(60)
    ]
    exact = decide(base, teacher, asked)
    for k in (8, VOCABULARY):
        lists = [(top(p, k), top(t, k)) for p, t in rows]
        together = decide_truncated(lists, asked, VOCABULARY)
        alone = [
            sample_truncated([pair], [s], VOCABULARY) for pair, s in zip(lists, asked, strict=True)
        ]
        assert [d.token_ids[0] for d in alone] == [d.token_id for d in together]

        for e, d in zip(exact, together, strict=True):
            assert abs(d.alpha - e.alpha) <= d.alpha_bound + 1e-7
            if k == VOCABULARY:
                assert (d.token_id, d.alpha_bound, d.tv_bound) == (e.token_id, 0.0, 0.0)


def test_a_pair_samples_by_the_rule(pair: Pair) -> None:
    params = SamplingParams.preset(
        "exploratory", alpha_rule=DoubleKL(), max_tokens=20, seed=3, ignore_eos=True
    )
    (completion,) = pair.generate(["Once upon a time"], params, progress=False)
    found = completion.diagnostics
    inside = [n for n, alpha in enumerate(found.alpha) if 0 < alpha < 1 and alpha != 0.5]
    assert len(inside) > 10
    for n in inside:
        assert found.kl_base[n] == pytest.approx(2 * found.kl_teacher[n], abs=1e-5)

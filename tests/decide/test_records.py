"""What a trainer is told of a draw, against softmaxes in float64, one row at a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from midlogit.core import reference
from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import EqualKL, KLBudget
from midlogit.core.uniforms import BLOCK, TokenUniforms, Uniforms
from midlogit.decide.arrays import decide
from midlogit.decide.base import RowSettings
from midlogit.outputs import Decision
from tests.law import chi_square_p
from tests.rows import make_rows, row_settings

V = 40
MASKED = (3, 17)
STOPS = (9, 30, V, V + 2)  # the last two lie beyond one of the models
ALPHABETS = (
    Outcomes(),
    Outcomes(masked_ids=MASKED),
    Outcomes(MASKED, STOPS[:2]),
    Outcomes(MASKED, STOPS[:2], stop_id="base"),
)


def wide(x_V: np.ndarray, extra: int) -> np.ndarray:
    return np.concatenate([x_V, np.linspace(-1.0, 1.0, extra)])


def facts(
    base: np.ndarray, teacher: np.ndarray, settings: RowSettings, found: Decision
) -> dict[str, float]:
    """The fields of a record by the formulas of docs/theory.md section 9.1, for a row without −inf."""
    outcomes, T = settings.outcomes, settings.temperature or 1.0
    p, t = (reference.softmax(x.tolist(), T) for x in (base, teacher))
    stops = [i for i in outcomes.stop_ids if outcomes.merged]
    members = stops if found.token_id in stops else [found.token_id]
    merged = []
    for row in (p, t):
        merged.append(row[:V])
        if stops:
            for i in stops:
                merged[-1][i : i + 1] = [0.0] * (i < V)
            merged[-1][stops[0]] = math.fsum(row[i] for i in stops if i < len(row))
    allowed = set(range(V)) - outcomes.masked
    support = allowed
    if settings.top_p is not None:
        support = reference.nucleus(reference.condition(merged[1], allowed), settings.top_p)
    mass = [math.fsum(m[i] for i in support) for m in merged]
    whole = reference.mixture(
        *([math.log(x) if x else -math.inf for x in m] for m in merged),
        masked_ids=outcomes.masked, top_p=settings.top_p,
    )  # fmt: skip
    outcome = outcomes.outcome_of(found.token_id)
    logprob = math.log(whole.q[outcome])
    if outcomes.draws_stop_id and len(members) > 1:
        share = p[found.token_id] / math.fsum(p[i] for i in members if i < len(p))
        logprob += math.log(share)
    own = [row[found.token_id] if found.token_id < len(row) else 0.0 for row in (p, t)]
    log = [math.log(x) if x else -math.inf for x in own]
    return {
        "logprob": logprob,
        "base_tempered_logprob": log[0],
        "teacher_tempered_logprob": log[1],
        "base_support_logprob": math.log(whole.p[outcome]),
        "teacher_support_logprob": math.log(whole.t[outcome]),
        "base_support_logmass": math.log(mass[0]),
        "teacher_support_logmass": math.log(mass[1]),
    }


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_records_against_softmaxes(library: str) -> None:
    rng = np.random.default_rng(0)
    checked = 0
    for outcomes, temperature, top_p, extra in itertools.product(
        (*ALPHABETS, Outcomes(MASKED, STOPS, stop_id="base"), Outcomes(MASKED, STOPS)),
        (1.0, 0.6, 1.7, 0.0),
        (None, 0.5, 0.95),
        ((0, 3), (3, 0)),
    ):
        base, teacher = make_rows("random", V, int(rng.integers(2**32)))
        base, teacher = wide(base, extra[0]), wide(teacher, extra[1])
        base[9], teacher[30] = base.max() + 1, teacher.max() + 1
        settings = [
            row_settings(
                outcomes=outcomes, temperature=temperature, top_p=top_p,
                uniforms=TokenUniforms(*rng.random(4).tolist()),
            )
            for _ in range(4)
        ]  # fmt: skip
        rows = (np.tile(x, (4, 1)) for x in (base, teacher))
        base_NV, teacher_NV = map(torch.tensor, rows) if library == "torch" else rows
        for s, found in zip(settings, decide(base_NV, teacher_NV, settings), strict=True):
            assert found.error is None and not found.fallback
            for name, value in facts(base, teacher, s, found).items():
                assert math.isclose(getattr(found, name), value, abs_tol=1e-6), (s, name, found)
            if found.token_id not in outcomes.merged_stops:
                for side in ("base", "teacher"):
                    own, inside, mass = (
                        getattr(found, f"{side}_{name}")
                        for name in ("tempered_logprob", "support_logprob", "support_logmass")
                    )
                    assert math.isclose(own, inside + mass, abs_tol=1e-9)
            checked += 1
    assert checked == 6 * 4 * 3 * 2 * 4


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.4])
@pytest.mark.parametrize("rule", [EqualKL(), KLBudget(0.01)])
def test_ratios_average_to_one_on_the_full_support(temperature: float, rule: EqualKL) -> None:
    """E_q[π/q] = 1 over every id that can be drawn, and Σ q = 1; with a nucleus it is the mass of the support."""
    outcomes = Outcomes((), (9, 30, 31), stop_id="base")
    base, teacher = make_rows("random", V, 5)
    for top_p in (None, 0.8):
        row = row_settings(rule=rule, outcomes=outcomes, temperature=temperature, top_p=top_p)
        scored = [replace(row, given=i) for i in range(V)]
        found = decide(np.tile(base, (V, 1)), np.tile(teacher, (V, 1)), scored)
        drawn = [d for d in found if d.logprob > -math.inf]
        assert [d.token_id for d in found] == list(range(V))
        assert math.isclose(math.fsum(math.exp(d.logprob) for d in drawn), 1, rel_tol=1e-9)
        mean = math.fsum(
            math.exp(d.logprob) * math.exp(d.base_tempered_logprob - d.logprob) for d in drawn
        )
        assert math.isclose(mean, math.exp(drawn[0].base_support_logmass), rel_tol=1e-9)
        assert math.isclose(mean, 1, rel_tol=1e-9) == (top_p is None)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_stop_id_follows_the_base(temperature: float) -> None:
    """The class by q*, then the id by the base's own conditional, of its own ids alone."""
    outcomes, draws = Outcomes((), STOPS, stop_id="base"), 6000
    base, teacher = (x / 2 for x in make_rows("random", V, 2))
    base = wide(base, 3)
    base[[9, 30, V, V + 2]] = [4.0, 3.5, 3.0, 2.5]
    teacher[30] = 6.0
    uniforms = Uniforms(3, 0)
    settings = [
        row_settings(outcomes=outcomes, temperature=temperature, uniforms=uniforms.at(k))
        for k in range(draws)
    ]
    found = decide(np.tile(base, (draws, 1)), np.tile(teacher, (draws, 1)), settings)
    ended = [d for d in found if d.token_id in STOPS]
    assert len(ended) > 1500
    share = reference.softmax([base[i] for i in STOPS], temperature)
    assert chi_square_p([STOPS.index(d.token_id) for d in ended], share) > 1e-3
    for d in ended:
        ratio = d.base_tempered_logprob - d.logprob
        first = ended[0]
        assert math.isclose(ratio, first.base_tempered_logprob - first.logprob, abs_tol=1e-9)
    teachers = [replace(s, outcomes=replace(outcomes, stop_id="teacher")) for s in settings]
    others = decide(np.tile(base, (draws, 1)), np.tile(teacher, (draws, 1)), teachers)
    for d, other in zip(found, others, strict=True):
        assert d.token_id == other.token_id or (d.token_id in STOPS and other.token_id == 30)
        assert d.base_support_logprob == other.base_support_logprob


def test_a_base_without_mass_on_its_stop_ids() -> None:
    """The class is drawn from the teacher alone; the id is the class's first, which both models have."""
    outcomes = Outcomes((), (9, 30), stop_id="base")
    base, teacher = np.zeros(V), np.zeros(V)
    base[[9, 30]], teacher[9] = -np.inf, 50.0
    (found,) = decide(base[None], teacher[None], [row_settings(outcomes=outcomes, forced=True)])
    assert found.token_id == 9 and math.isclose(found.logprob, 0, abs_tol=1e-9)
    assert found.base_tempered_logprob == found.base_support_logprob == -math.inf
    assert math.isclose(found.base_support_logmass, 0, abs_tol=1e-12)


def test_supports_on_request() -> None:
    base, teacher = make_rows("random", V, 8)
    teacher[30] = teacher.max() + 1
    for outcomes in ALPHABETS:
        row = row_settings(outcomes=outcomes, top_p=0.9, temperature=0.8)
        plain, asked = decide(
            np.tile(base, (2, 1)),
            np.tile(teacher, (2, 1)),
            [row, replace(row, return_support=True)],
        )
        assert plain.support is None and replace(asked, support=None) == plain
        assert asked.support == sorted(asked.support) and not outcomes.masked & set(asked.support)
        assert {*outcomes.merged_stops} <= {*asked.support}
        for logits, mass in (
            (base, asked.base_support_logmass),
            (teacher, asked.teacher_support_logmass),
        ):
            p = reference.softmax(logits.tolist(), 0.8)
            assert math.isclose(
                mass, math.log(math.fsum(p[i] for i in asked.support)), abs_tol=1e-9
            )


def test_uniforms_of_endings_change_no_other() -> None:
    """The first three are those of before there was a fourth; all of a sequence are different."""
    uniforms = Uniforms(7, 2, b"prompt")
    generator = np.random.Generator(np.random.Philox(key=uniforms._key, counter=uniforms._first))
    values = generator.random((3 * BLOCK, 4))
    drawn = [uniforms.at(k) for k in range(3 * BLOCK)]
    assert [u[:3] for u in drawn] == [tuple(row[:3]) for row in values.tolist()]
    assert [uniforms.seed_at(k) for k in (0, 100)] == [int(values[k, 3] * 2**53) for k in (0, 100)]
    everything = [x for u in drawn for x in u] + values[:, 3].tolist()
    assert len(set(everything)) == len(everything)

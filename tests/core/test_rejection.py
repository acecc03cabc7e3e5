"""Drafted sequences follow the product of q* of each position for every number of drafts; wrong rules do not.

The rows are a small tree: a pair for each prefix. The rounds are those of the engines.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from midlogit.core import reference
from midlogit.core.draw import draw_columns
from midlogit.core.outcomes import Outcomes
from midlogit.core.rejection import accepted, num_accepted, residual
from midlogit.core.rules import AlphaRule, EqualKL, FixedAlpha, KLBudget
from midlogit.core.uniforms import TokenUniforms, Uniforms
from midlogit.decide.arrays import decide, draft
from tests.law import chi_square_p
from tests.rows import row_pairs, row_settings

RUNS = 50_000
REPEATED = 10_000  # of them, with each number of drafts
LONGEST = 4  # tokens of a sequence
VOCABULARY = 6
STOPS = (4, 1)
NODES = sum(VOCABULARY**n for n in range(LONGEST))  # prefixes that a token may follow
ALL = range(1, 6)
ALMOST_ONE = 1 - 2**-53
MERGED = Outcomes((), STOPS)


@dataclass(frozen=True)
class Case:
    """The settings of every run, and the rule as the reference knows it."""

    rule: AlphaRule
    plain_rule: Callable[[list[float], list[float]], float]
    temperature: float
    top_p: float | None = None
    forced: bool = False
    min_tokens: int = 0
    outcomes: Outcomes = MERGED

    def forced_at(self, position: int) -> bool:
        return self.forced and position == 0


EQUAL = EqualKL(), reference.equal_kl
FIXED = FixedAlpha(0.3), lambda p, t: 0.3
BUDGET = KLBudget(0.05), lambda p, t: reference.kl_budget(p, t, 0.05)
CASES = {
    "equal_cool_all": (Case(*EQUAL, 0.7, top_p=0.85, forced=True), ALL),
    "fixed_hot_forced": (Case(*FIXED, 1.3, forced=True), ALL),
    "budget_hot_support": (Case(*BUDGET, 1.3, top_p=0.85, min_tokens=1), ALL),
    "equal_hot": (Case(*EQUAL, 1.3), (3,)),
    "fixed_cool_support": (Case(*FIXED, 0.7, top_p=0.85), (2,)),
    "budget_cool_all": (Case(*BUDGET, 0.7, top_p=0.85, forced=True), (4,)),
    "equal_masks_unmerged": (Case(*EQUAL, 1.0, outcomes=Outcomes((0,), STOPS, merge=False)), (5,)),
}


@pytest.fixture(scope="module", autouse=True)
def uncollected() -> Iterator[None]:
    """Hundreds of thousands of small objects, no cycles: looking for garbage among them takes half of the time."""
    gc.disable()
    yield
    gc.enable()


def child(node, token):
    """The number of the prefix that a token makes of another."""
    return 1 + VOCABULARY * node + token


@cache
def tree() -> tuple[np.ndarray, np.ndarray]:
    """(base, teacher) logits of every prefix, [NODES, VOCABULARY]."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=(NODES, VOCABULARY)) * 1.2
    return base, base + rng.normal(size=base.shape) * 0.9


@cache
def token_uniforms() -> list[list[TokenUniforms]]:
    """The uniforms of every position of every run."""
    runs = [Uniforms(seed=9, sample=run) for run in range(RUNS)]
    return [[uniforms.at(position) for uniforms in runs] for position in range(LONGEST)]


@lru_cache(maxsize=1)
def asked(case: Case) -> np.ndarray:
    """RowSettings [LONGEST, RUNS]."""
    made = [
        row_settings(
            rule=case.rule,
            outcomes=case.outcomes,
            temperature=case.temperature,
            top_p=case.top_p,
            alpha_tol=1e-9,
            forced=case.forced_at(position),
            may_end=position >= case.min_tokens,
            uniforms=uniforms,
        )
        for position in range(LONGEST)
        for uniforms in token_uniforms()[position]
    ]
    return np.array(made, dtype=object).reshape(LONGEST, RUNS)


def run(case: Case, drafts: int, runs: int = RUNS) -> np.ndarray:
    """Tokens [runs, LONGEST] of sequences that draft so many tokens per round, −1 after their end."""
    base, teacher = tree()
    tokens = np.full((runs, LONGEST), -1)
    node, length = np.zeros(runs, dtype=int), np.zeros(runs, dtype=int)
    running = np.arange(runs)
    while running.size:
        drafted = np.full((drafts, runs), -1)
        ahead, at = running, node.copy()
        for place in range(drafts):  # the base goes on alone, but not beyond the last token
            ahead = ahead[length[ahead] + place < LONGEST - 1]
            drafted[place, ahead] = draft(
                base[at[ahead] % NODES], list(asked(case)[length[ahead] + place, ahead]), VOCABULARY
            )
            at[ahead] = child(at[ahead], drafted[place, ahead])
        alive = running
        for place in range(
            drafts + 1
        ):  # the teacher has read the drafts: one token per accepted draft, and one more
            if not alive.size:
                break
            rows = node[alive]
            decisions = decide(base[rows], teacher[rows], list(asked(case)[length[alive], alive]))
            drawn = np.array([d.token_id for d in decisions])
            tokens[alive, length[alive]] = drawn
            node[alive] = child(rows, drawn)
            length[alive] += 1
            ended = np.isin(drawn, STOPS) | (length[alive] == LONGEST)
            node[alive[ended]] = -1
            if place < drafts:
                alive = alive[~ended & (drawn == drafted[place, alive])]
        running = running[node[running] >= 0]
    return tokens


def mixture(case: Case, node: int, position: int) -> reference.Mixture:
    """q* after a prefix, by the float64 reference."""
    base, teacher = tree()
    return reference.mixture(
        base[node].tolist(),
        teacher[node].tolist(),
        temperature=case.temperature,
        masked_ids=set(case.outcomes.masked_ids)
        | set(() if position >= case.min_tokens else STOPS),
        stop_ids=STOPS if case.outcomes.merged else (),
        top_p=case.top_p,
        forced=case.forced_at(position),
        rule=case.plain_rule,
    )


def exact_probabilities(case: Case) -> dict[tuple[int, ...], float]:
    """The probability of each sequence; the merged stop class is written as its first id."""

    def grow(
        prefix: tuple[int, ...], node: int, mass: float
    ) -> Iterator[tuple[tuple[int, ...], float]]:
        for token, q in enumerate(mixture(case, node, len(prefix)).q):
            sequence = (*prefix, token)
            if token in STOPS or len(sequence) == LONGEST:
                yield sequence, mass * q
            else:
                yield from grow(sequence, child(node, token), mass * q)

    return dict(grow((), 0, 1.0))


def p_value(case: Case, tokens: np.ndarray) -> float:
    """Chi-square of sequences against their exact probabilities."""
    exact = exact_probabilities(case)
    number = {sequence: n for n, sequence in enumerate(exact)}
    if case.outcomes.merged:
        tokens = np.where(np.isin(tokens, STOPS), STOPS[0], tokens)
    found = [number[tuple(t for t in row if t >= 0)] for row in tokens.tolist()]
    return chi_square_p(found, list(exact.values()))


@pytest.mark.parametrize("name", CASES)
def test_sequences_follow_the_product_of_q_whatever_the_drafts(name: str) -> None:
    case, numbers = CASES[name]
    lock_step = run(case, 0)
    assert p_value(case, lock_step) > 0.01
    for drafts in numbers:
        np.testing.assert_array_equal(run(case, drafts, REPEATED), lock_step[:REPEATED])


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("accepted", lambda target_N, draft_N, uniform_N: uniform_N < target_N),
        ("residual", lambda target_NV, draft_NV: target_NV),
    ],
    ids=["accepts_with_r", "redraws_from_r"],
)
@pytest.mark.parametrize("drafts", [0, 3])
def test_the_chi_square_test_tells_wrong_rules(
    monkeypatch: pytest.MonkeyPatch, function, wrong, drafts: int
) -> None:
    case, _ = CASES["equal_cool_all"]
    monkeypatch.setattr(f"midlogit.decide.sampling.{function}", wrong)
    assert p_value(case, run(case, drafts)) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_drafts_are_accepted_as_often_as_the_distributions_overlap(name: str) -> None:
    """Σ min(r, D) after the empty prefix; a rejected draft is never drawn again."""
    case, _ = CASES[name]
    base, teacher = tree()
    rows = list(asked(case)[0])
    drafted = draft(np.tile(base[0], (RUNS, 1)), rows, VOCABULARY)
    drawn = [d.token_id for d in decide(*(np.tile(x[0], (RUNS, 1)) for x in (base, teacher)), rows)]
    kept = sum(case.outcomes.outcome_of(t) == d for t, d in zip(drawn, drafted, strict=True))
    d = reference.softmax(base[0].tolist(), case.temperature)
    masked = set(case.outcomes.masked_ids) | set(() if case.min_tokens == 0 else STOPS)
    if case.outcomes.merged:
        d = reference.merge_stops(d, STOPS)
    d = reference.condition(d, set(range(VOCABULARY)) - masked)
    overlap = sum(map(min, mixture(case, 0, 0).q, d))
    assert stats.binomtest(kept, RUNS, overlap).pvalue > 0.01
    assert stats.binomtest(kept, RUNS, overlap - 0.01).pvalue < 0.01  # the test can fail


@pytest.mark.parametrize(
    ("drafted", "sampled", "number"),
    [
        ([], [], 0),
        ([], [5], 0),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 9, 3, 4], 1),
        ([1, 2, 3], [9], 0),
        ([1, 2, 3], [1, 2], 2),
    ],
)
def test_accepted_drafts_are_the_common_beginning(
    drafted: list[int], sampled: list[int], number: int
) -> None:
    assert num_accepted(drafted, sampled) == number


def masses(logits: np.ndarray) -> np.ndarray:
    mass = np.exp(logits - logits.max())
    return (mass / mass.sum())[None]


uniform = st.one_of(
    st.sampled_from([0.0, ALMOST_ONE]), st.integers(0, 2**53 - 1).map(lambda k: k * 2.0**-53)
)


@given(row_pairs(60))
def test_the_residual_is_what_the_target_has_more(rows) -> None:
    draft_NV, target_NV = map(masses, rows)
    rest_NV = residual(target_NV, draft_NV)
    if np.array_equal(rest_NV, target_NV):  # no overlap at all, or nothing left
        assert np.minimum(target_NV, draft_NV).sum() < 1e-15 or (target_NV <= draft_NV).all()
        return
    np.testing.assert_array_equal(rest_NV, np.where(target_NV > draft_NV, target_NV - draft_NV, 0))
    assert rest_NV.sum() == pytest.approx(1 - np.minimum(target_NV, draft_NV).sum(), abs=1e-12)


@given(row_pairs(60), uniform, uniform, uniform)
def test_a_token_without_mass_under_the_target_is_never_the_outcome(
    rows, first, second, third
) -> None:
    draft_NV, target_NV = map(masses, rows)
    target_NV[:, ::2] = 0  # as masks and the support do
    if target_NV.sum() == 0:
        return
    (drafted,) = draw_columns(draft_NV, np.array([first]))
    if accepted(target_NV[:, drafted], draft_NV[:, drafted], np.array([second]))[0]:
        assert target_NV[0, drafted] > 0
    else:
        assert target_NV[0, draw_columns(residual(target_NV, draft_NV), np.array([third]))[0]] > 0


@given(row_pairs(60), uniform)
def test_a_draft_from_the_target_itself_is_always_accepted(rows, accept_uniform) -> None:
    (target_V,) = masses(rows[0])
    target_V = target_V[target_V > np.finfo(float).tiny]
    assert accepted(target_V, target_V, np.full(len(target_V), accept_uniform)).all()


@given(row_pairs(60), uniform)
def test_a_draft_without_any_mass_is_never_accepted(rows, accept_uniform) -> None:
    (target_V,) = masses(rows[0])
    assert not accepted(
        target_V, np.zeros_like(target_V), np.full(len(target_V), accept_uniform)
    ).any()


@settings(max_examples=60)
@given(
    row_pairs(60),
    st.tuples(uniform, uniform, uniform),
    st.sampled_from([None, 0.5, 0.95]),
    st.booleans(),
)
def test_every_draw_has_mass_under_q(rows, three, top_p, forced) -> None:
    """Whatever the rows, and at both ends of the uniforms: the whole decision, with its draft."""
    base_NV, teacher_NV = (row[None] for row in rows)
    for temperature in (0.7, 1.0):
        uniforms = TokenUniforms(*three)
        asked_for = row_settings(
            temperature=temperature, top_p=top_p, forced=forced, uniforms=uniforms
        )
        (d,) = decide(base_NV, teacher_NV, [asked_for])
        assert d.error is None and np.isfinite(d.logprob)
        (drafted,) = draft(base_NV, [asked_for], base_NV.shape[-1])
        assert base_NV[0, drafted] > -np.inf

"""Scores of given text on vLLM, in chunks and among requests that are generated: those of the local engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from midlogit import Pair, SamplingParams, Scores
from midlogit.requests.prompts import Reading
from tests.conftest import BASE
from tests.questions import QUESTIONS
from tests.updates import held_up, named, trained
from tests.vllm.conftest import engine_of, open_crowded, require_empty
from tests.vllm.test_engine import preemptions
from tests.vllm.test_updates import reused

EXPLORATORY = SamplingParams.preset("exploratory", temperature=0.8, top_logprobs=3)
TEXT = "Once upon a time there was a fox who lived in the forest. The dog was his friend. "
Prompts = tuple[list[list[int]], list[list[int]]]  # (base, teacher)


@pytest.fixture(scope="module", params=["off", 3], ids=["lock_step", "drafting"])
def crowded(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A step computes 64 tokens, and the caches hold two or three of the texts."""
    with open_crowded(speculation=request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def prompts(pair: Pair) -> Prompts:
    """Texts of 1 to 200 tokens; on either side the longer prompt, some without one of their own."""
    words, chance = pair.mixing.base.encode(40 * TEXT), random.Random(3)
    found: Prompts = [], []
    for n in range(14):
        given = words[n:][: (1, 2, 30, 70, 130, 200)[n % 6]]
        for side in (0, 1):
            own = chance.randrange(1, 240 - len(given)) if n % 4 else 0
            found[side].append([*chance.choices(words, k=own), *given])
    return found


def score(pair: Pair, prompts: Prompts, params: SamplingParams = EXPLORATORY) -> list[Scores]:
    return pair.score(params=params, base_prompts=prompts[0], teacher_prompts=prompts[1])


def require_equal(found: list[Scores], expected: list[Scores]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.first, ours.error) == (theirs.token_ids, theirs.first, None)
        for name in (
            "logprobs", "alpha", "kl_base", "kl_teacher", "base_tempered_logprobs", "teacher_tempered_logprobs",
        ):  # fmt: skip
            one, other = (getattr(scores.diagnostics, name) for scores in (ours, theirs))
            assert one == pytest.approx(other, abs=1e-4), name
        for mine, other_top in zip(ours.top or (), theirs.top or (), strict=True):
            assert [i for i, _ in mine.q] == [i for i, _ in other_top.q]


def test_scores_are_those_of_the_local_engine(pair: Pair, crowded: Pair, prompts: Prompts) -> None:
    """In chunks, preempted, among requests that are generated before and after."""
    expected = score(pair, prompts)
    generated = SamplingParams(seed=1, max_tokens=30, ignore_eos=True)
    with preemptions(crowded) as counts:
        batch = crowded.start(crowded.prepare(QUESTIONS[:6], generated, Reading()))
        with ThreadPoolExecutor() as threads:
            scored = threads.submit(score, crowded, prompts)
            after = crowded.generate(QUESTIONS[6:8], generated)
        require_equal(scored.result(), expected)
        found = [*sorted(batch, key=lambda completion: completion.index), *after]
    assert min(counts) > 0
    alone = pair.generate(QUESTIONS[:8], generated)
    assert sum(a.token_ids == b.token_ids for a, b in zip(found, alone, strict=True)) >= 7
    require_empty(crowded)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(force_first_token=True, min_tokens=9, temperature=0),
        SamplingParams.preset("rollout", max_tokens=3),
    ],
    ids=["nucleus", "greedy", "rollout"],
)
def test_settings_mean_what_they_do_elsewhere(
    pair: Pair, crowded: Pair, prompts: Prompts, params: SamplingParams
) -> None:
    some = prompts[0][:6], prompts[1][:6]
    require_equal(score(crowded, some, params), score(pair, some, params))
    nothing = crowded.score([[5]], params)[0]
    assert (nothing.diagnostics.logprobs, nothing.error) == ([], None)


def test_what_is_scored_is_never_taken_from_the_prefix_cache(pair: Pair, crowded: Pair) -> None:
    """The context before it is, on either side, and the text itself by neither later texts nor requests."""
    own = pair.mixing.base.encode(6 * TEXT)[:100]
    given = pair.mixing.base.encode(3 * TEXT)[:60]
    contexts: Prompts = ([[*own, *given]], [[*own[::-1], *given]])
    expected = score(pair, contexts)
    for expected_reuse in (0, 96):  # three blocks of 32 tokens
        with reused(crowded) as counts:
            require_equal(score(crowded, contexts), expected)
        assert counts == [expected_reuse, expected_reuse]
    with reused(crowded) as counts:
        require_equal(crowded.score([given] * 2, EXPLORATORY), pair.score([given] * 2, EXPLORATORY))
    assert counts == [0, 0]


def test_texts_that_nobody_waits_for_are_dropped(
    pair: Pair, crowded: Pair, prompts: Prompts
) -> None:
    requests = crowded.prepare(
        None, EXPLORATORY, Reading(), base_prompts=prompts[0], teacher_prompts=prompts[1]
    )

    async def leave(wait: Callable[[], Any]) -> None:
        task = asyncio.create_task(crowded.run_scores(requests))
        await asyncio.to_thread(wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for steps in (1, 3, 12):
        with held_up(crowded, steps) as (reached, go):
            asyncio.run(leave(lambda reached=reached: reached.wait(60)))
            go.set()
        some = prompts[0][:3], prompts[1][:3]
        require_equal(score(crowded, some), score(pair, some))
        require_empty(crowded)


def test_few_texts_are_under_way_at_once(
    pair: Pair, crowded: Pair, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states are kept of so many tokens, or of one text."""
    from midlogit.engines.vllm import scoring

    monkeypatch.setattr(scoring, "SCORED_TOKENS", 100)
    monkeypatch.setattr(scoring, "SCORED_ROWS", 7)
    scorer, kept = engine_of(crowded).lockstep.scorer, []
    start = scorer._start

    def note() -> None:
        start()
        kept.append([text.request.given for text in scorer._running.values()])

    monkeypatch.setattr(scorer, "_start", note)
    require_equal(score(crowded, prompts), score(pair, prompts))
    assert max(map(len, kept)) > 1
    assert all(len(given) <= 1 or sum(given) <= 100 for given in kept)


@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_are_one_position_off_are_noticed(
    pair: Pair, crowded: Pair, prompts: Prompts, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison that the other tests make can fail."""
    runner: Any = engine_of(crowded).cores[side]._runner
    hidden_states = runner.hidden_states

    def shifted(key: str) -> Any:
        first, states_QH = hidden_states(key)
        return first, states_QH.roll(1, 0)

    monkeypatch.setattr(runner, "hidden_states", shifted)
    some = prompts[0][3:5], prompts[1][3:5]
    with pytest.raises(AssertionError, match="logprobs"):
        require_equal(score(crowded, some), score(pair, some))


def test_one_version_of_the_base_scores_a_text(crowded: Pair, prompts: Prompts) -> None:
    """New weights come in the midst of texts, of which one side has read more than the other."""
    with (
        Pair.local(dtype="float32", device="cpu", speculation="off") as local,
        ThreadPoolExecutor() as threads,
    ):
        old = score(local, prompts)
        for seed, running in ((1, "recompute"), (2, "keep")):
            weights = named(trained(seed, 0.03))
            with held_up(crowded, 12) as (reached, go):
                scored = threads.submit(score, crowded, prompts)
                assert reached.wait(60)
                scorer = engine_of(crowded).lockstep.scorer
                assert scorer.running_keys and len(scorer.running_keys) < len(prompts[0])
                crowded.update_base(weights.items(), running=running)
                go.set()
            local.update_base(weights.items())
            new = score(local, prompts)
            is_new = [equal_to(one, [new[n], old[n]]) for n, one in enumerate(scored.result())]
            assert 0 < sum(is_new) < len(new)
            old = new
        crowded.update_base(BASE)
        require_empty(crowded)


def equal_to(found: Scores, two: list[Scores]) -> bool:
    """Whether scores are the first of two, else they must be the second."""
    try:
        require_equal([found], two[:1])
    except AssertionError:
        require_equal([found], two[1:])
        return False
    return True

"""Guesses for the base's drafts: some stand, some do not, and the tokens are those of the local engine without any."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from midlogit import Completion, Pair, SamplingParams
from midlogit.engines.draft_length import MAX_DRAFTS, DraftLength
from midlogit.engines.vllm import drafting
from midlogit.engines.vllm.observer import StepRecord
from midlogit.engines.vllm.options import DRAFT_LENGTHS
from tests.questions import QUESTIONS
from tests.vllm.conftest import (
    BASE_TOKEN,
    BLOCK,
    TEACHER_TOKEN,
    engine_of,
    open_pair,
    require_empty,
)
from tests.vllm.test_engine import preemptions, require_equal

RIVER = "The little river ran to the sea. " * 3
PROMPTS = [RIVER, *(f"{question} {question}" for question in QUESTIONS[:3])]
GREEDY = SamplingParams.preset("exploratory", temperature=0, max_tokens=90, ignore_eos=True)
SAMPLES = SamplingParams.preset("rollout", n=8, seed=3, temperature=0.4, max_tokens=60)


class Guessing(DraftLength):
    """Guesses wherever it can, whatever the times of this machine say."""

    def __init__(self, gamma: int | str) -> None:
        super().__init__(gamma, DRAFT_LENGTHS, reuses_bonus_row=True)

    def guesses_pay(self, rates_N: Sequence[float]) -> bool:
        return any(rates_N)


@pytest.fixture(scope="module")
def guessing() -> Iterator[Pair]:
    """A pair whose caches hold a few sequences, so that others preempt them."""
    caches = (36 * BLOCK * BASE_TOKEN, 30 * BLOCK * TEACHER_TOKEN)
    limits = {"max_num_seqs": 32, "max_num_batched_tokens": 512}
    with open_pair(speculation=3, kv_cache_memory_bytes=caches, **limits) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(pair: Pair) -> tuple[list[Completion], list[Completion]]:
    """Of greedy texts and of samples, by the local engine."""
    return pair.generate(PROMPTS, GREEDY), pair.generate(PROMPTS[:2], SAMPLES)


def generate(
    pair: Pair, gamma: int | str, prompts: list[str], asked: SamplingParams
) -> tuple[list[Completion], DraftLength]:
    """Completions with guesses, and what was counted of their drafts."""
    lengths = engine_of(pair).lockstep.draft_length = Guessing(gamma)
    return pair.generate(prompts, asked), lengths


@pytest.mark.parametrize("gamma", [2, 15, "auto"])
def test_tokens_are_those_without_guesses(
    guessing: Pair, expected: tuple[list[Completion], ...], gamma: int | str
) -> None:
    found, lengths = generate(guessing, gamma, PROMPTS, GREEDY)
    require_equal(found, expected[0])
    counted = lengths.statistics()
    assert 10 < counted["guessed_rounds"] < counted["rounds"]
    assert counted["guesses_stood"] > counted["guessed_rounds"]
    require_empty(guessing)


@pytest.mark.parametrize("gamma", [3, "auto"])
def test_samples_of_a_prompt_are_those_without_guesses(
    guessing: Pair, expected: tuple[list[Completion], ...], gamma: int | str
) -> None:
    found, lengths = generate(guessing, gamma, PROMPTS[:2], SAMPLES)
    require_equal(found, expected[1])
    counted = lengths.statistics()
    assert 10 < counted["guessed_rounds"] < counted["rounds"]
    assert counted["guesses_stood"] > 0.5 * counted["guessed_rounds"]
    require_empty(guessing)


def test_a_wrong_guess_that_stood_would_be_seen(
    guessing: Pair, expected: tuple[list[Completion], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same comparison, with all guesses taken for the base's drafts."""
    all_stand = lambda guesses_PN, drafted_PN: torch.full_like(guesses_PN[0], len(guesses_PN))  # noqa: E731
    monkeypatch.setattr(drafting, "num_alike", all_stand)
    found, _ = generate(guessing, 3, PROMPTS, GREEDY)
    assert [one.token_ids for one in found] != [one.token_ids for one in expected[0]]
    require_empty(guessing)


def test_a_round_with_guesses_has_two_forward_passes_of_the_base(guessing: Pair) -> None:
    records: list[StepRecord] = []
    lockstep = engine_of(guessing).lockstep
    steps = []
    execute = lockstep.base.execute

    def counting(step, *tokens):
        steps.append(step.num_drafts)
        return execute(step, *tokens)

    lockstep.base.execute = counting  # type: ignore[method-assign]
    lockstep.observer = records.append
    (found,), lengths = generate(guessing, 4, PROMPTS[:1], GREEDY)
    lockstep.observer = None
    del lockstep.base.execute
    guessed = [record for record in records if record.num_drafts == MAX_DRAFTS]
    assert len(guessed) == lengths.statistics()["guessed_rounds"] == sum(map(bool, steps)) > 2
    assert sum(record.num_stood for record in records) == lengths.statistics()["guesses_stood"] > 20
    assert max(record.num_tokens for record in guessed) >= 8
    assert len(steps) < 0.6 * len(found.token_ids)


def test_stops_aborts_and_preemptions_among_guesses(pair: Pair, guessing: Pair) -> None:
    """Greedy texts with stop strings and stop ids; long ones are left early, and are the beginnings of whole ones."""
    chance = random.Random(6)
    lengths = engine_of(guessing).lockstep.draft_length = Guessing(3)
    batches = []
    for number in range(12):
        is_long = number % 3 == 0
        prompts = [" ".join(["river"] * chance.randrange(4, 80)) for _ in range(4)]
        params = SamplingParams(
            temperature=0,
            max_tokens=150 if is_long else chance.randrange(20, 60),
            stop=() if is_long else chance.choice([(), ("river the",), ("e",)]),
            stop_token_ids=() if is_long else chance.choice([(), (300,)]),
            ignore_eos=is_long or chance.random() < 0.5,
        )
        batches.append((is_long, prompts, params, guessing.as_completed(prompts, params)))

    found = []
    with preemptions(guessing) as counts:
        for is_long, prompts, params, batch in sorted(batches, key=lambda batch: batch[0]):
            some = sorted(batch.stop() if is_long else batch, key=lambda one: one.index)
            found.append((prompts, params, some))
    require_empty(guessing)
    aborted = []
    for prompts, params, some in found:
        for one, truth in zip(some, pair.generate(prompts, params), strict=True):
            if one.finish_reason == "abort":
                assert truth.token_ids[: len(one.token_ids)] == one.token_ids
                aborted.append(len(one.token_ids))
            else:
                require_equal([one], [truth])
    assert max(counts) > 0 and any(aborted)
    assert lengths.statistics()["guesses_stood"] > 20

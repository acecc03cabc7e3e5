"""The local engine drafts ahead and changes nothing: same seed, same tokens, for every number of drafts.

In float64, where rounding that depends on the batch is too small to move a token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache

import pytest

from midlogit import Completion, KLBudget, Pair, SamplingParams, Token
from tests.conftest import TEACHER
from tests.law import continuations, same_law_ps
from tests.questions import QUESTIONS

SLOTS = 5  # fewer than prompts: sequences join and leave
DRAFTS = (1, 4, 16, "auto")


def open_pair(speculation, *models, **changes) -> Pair:
    return Pair.local(
        *models,
        **{
            "dtype": "float64",
            "device": "cpu",
            "max_num_seqs": SLOTS,
            "speculation": speculation,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def lock_step() -> Iterator[Pair]:
    with open_pair("off") as opened:
        yield opened


@pytest.fixture(scope="module", params=DRAFTS, ids=str)
def drafting(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with open_pair(request.param) as opened:
        yield opened


def require_equal(found: list[Completion], expected: list[Completion]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.index, ours.sample, ours.token_ids) == (
            theirs.index,
            theirs.sample,
            theirs.token_ids,
        )
        assert (ours.text, ours.finish_reason, ours.stop_reason, ours.usage) == (
            theirs.text, theirs.finish_reason, theirs.stop_reason, theirs.usage,
        )  # fmt: skip
        for field in fields(ours.diagnostics):
            a, b = (getattr(c.diagnostics, field.name) for c in (ours, theirs))
            assert a == pytest.approx(b, abs=1e-4), field.name
        assert (ours.top is None) == (theirs.top is None)
        for top, other in zip(ours.top or [], theirs.top or [], strict=True):
            for name in ("q", "base", "teacher"):
                a, b = getattr(top, name), getattr(other, name)
                assert [i for i, _ in a] == [i for i, _ in b]
                assert [lp for _, lp in a] == pytest.approx([lp for _, lp in b], abs=1e-4)


ASKED = {
    "cool": SamplingParams(seed=1, temperature=0.7, max_tokens=30),
    "hot": SamplingParams.preset("exploratory", seed=2, temperature=1.3, max_tokens=24),
    "samples": SamplingParams.preset("exploratory", seed=3, max_tokens=20, n=3),
    "stop_strings": SamplingParams(seed=4, max_tokens=40, stop=(" the", "a s", ". I", " and")),
    "stop_token_ids": SamplingParams(seed=4, max_tokens=40, stop_token_ids=(300, 15, 268, 16)),
    "min_tokens": SamplingParams.preset("exploratory", seed=6, max_tokens=34, min_tokens=27),
    "full_in_mid_run": SamplingParams(seed=7, max_tokens=4, ignore_eos=True),
    "one_token": SamplingParams(seed=7, max_tokens=1),
    "candidates": SamplingParams(seed=8, max_tokens=16, top_logprobs=4, force_first_token=False),
    "budget": SamplingParams(seed=9, max_tokens=24, alpha_rule=KLBudget(0.05), temperature=1.3),
    "greedy_balanced": SamplingParams(temperature=0, max_tokens=30),
    "greedy_exploratory": SamplingParams.preset("exploratory", temperature=0, max_tokens=24),
}


@pytest.fixture(scope="module")
def expected(lock_step: Pair) -> Callable[[str], list[Completion]]:
    """What lock-step gives for a case, generated once."""

    @cache
    def generate(case: str) -> list[Completion]:
        return lock_step.generate(prompts_for(ASKED[case]), ASKED[case], chat=True)

    return generate


def prompts_for(asked: SamplingParams) -> tuple[str, ...]:
    return QUESTIONS if asked.temperature == 0 else QUESTIONS[: 9 // asked.n]


@pytest.mark.parametrize("case", ASKED)
def test_every_completion_is_that_of_lock_step(case: str, drafting: Pair, expected) -> None:
    asked = ASKED[case]
    before = drafting.statistics()["speculation"]["rounds"]
    require_equal(drafting.generate(prompts_for(asked), asked, chat=True), expected(case))
    drafted = drafting.statistics()["speculation"]["rounds"] > before
    assert drafted or asked.max_tokens == 1 or not drafting.engine.draft_length.fixed


def test_the_cases_end_in_every_way(lock_step: Pair) -> None:
    """Else the test above would compare less than it seems to."""
    ends = {
        (c.finish_reason, type(c.stop_reason))
        for name in ("cool", "stop_strings", "stop_token_ids")
        for c in lock_step.generate(QUESTIONS, ASKED[name], chat=True)
    }
    assert ends == {("length", type(None)), ("stop", type(None)), ("stop", str), ("stop", int)}


AT_THE_END = SamplingParams(seed=3, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def at_the_end(lock_step: Pair) -> tuple[list[list[int]], list[Completion]]:
    """Prompts that leave little of the context, beside a short one, and what lock-step gives for them."""
    longest = lock_step.mixing.teacher.max_context
    prompts = [[1000 + room] * (longest - room) for room in (1, 2, 7)] + [[1000, 2000]]
    return prompts, lock_step.generate(prompts, AT_THE_END)


def test_prompts_near_the_end_of_the_context(drafting: Pair, at_the_end) -> None:
    """Drafts stop at the end of a context; sequences with more room share the batch."""
    prompts, completions = at_the_end
    found = drafting.generate(prompts, AT_THE_END)
    assert [len(c.token_ids) for c in found] == [1, 2, 7, 12]
    require_equal(found, completions)


def test_streams_tokens_in_order(lock_step: Pair, drafting: Pair) -> None:
    asked = SamplingParams(seed=4, max_tokens=40, stop=(" and",))
    for question in QUESTIONS[:3]:
        *tokens, completion = drafting.stream(question, asked, chat=True)
        assert [token.position for token in tokens] == list(range(len(tokens)))
        assert [token.token_id for token in tokens] == completion.token_ids
        assert "".join(token.text for token in tokens) == completion.text
        assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
        assert tokens[-1].finish_reason == completion.finish_reason
        require_equal([completion], lock_step.generate([question], asked, chat=True))


def test_sequences_that_join_and_leave_while_others_draft(lock_step: Pair, drafting: Pair) -> None:
    """One streams; others come at its tokens, one of them is aborted in the middle."""
    long = SamplingParams(seed=5, max_tokens=60, ignore_eos=True)
    short = SamplingParams.preset("exploratory", seed=6, max_tokens=9)
    found: dict[int, list[Completion]] = {}
    threads = []

    def join(number: int) -> None:
        found[number] = drafting.generate(QUESTIONS[number : number + 2], short, chat=True)

    def leave() -> None:
        for event in drafting.stream(QUESTIONS[9], long, chat=True):
            if isinstance(event, Token) and event.position == 10:
                break

    works = {3: lambda: join(1), 11: leave, 20: lambda: join(4), 33: lambda: join(7)}
    for event in drafting.stream(QUESTIONS[0], long, chat=True):
        if isinstance(event, Token) and event.position in works:
            threads.append(threading.Thread(target=works[event.position]))
            threads[-1].start()
    for thread in threads:
        thread.join()
    require_equal([event], lock_step.generate(QUESTIONS[:1], long, chat=True))
    assert sorted(found) == [1, 4, 7]
    for number, completions in found.items():
        require_equal(
            completions, lock_step.generate(QUESTIONS[number : number + 2], short, chat=True)
        )


def test_statistics_count_rounds_and_drafts() -> None:
    asked = SamplingParams(seed=1, max_tokens=40)
    with open_pair(4) as pair:
        assert pair.statistics()["speculation"] == {
            "rounds": 0, "verified": 0, "accepted": 0, "acceptance": None, "accepted_per_round": None,
            "acceptance_by_position": [], "drafts_in_use": {"all": 4}, "guessed_rounds": 0, "guesses_stood": 0,
        }  # fmt: skip
        tokens = sum(
            len(c.token_ids) for q in QUESTIONS for c in pair.generate([q], asked, chat=True)
        )
        found = pair.statistics()["speculation"]
    # A sequence's first token comes with its prompt; a round gives its accepted drafts and one token more, or ends
    # the sequence with a draft.
    assert (
        found["rounds"] + found["accepted"] - 16
        <= tokens - 16
        <= found["rounds"] + found["accepted"]
    )
    assert found["accepted"] <= found["verified"] <= 4 * found["rounds"]
    assert 0.5 < found["acceptance"] < 0.95
    assert found["acceptance"] == found["accepted"] / found["verified"]
    assert found["accepted_per_round"] == found["accepted"] / found["rounds"] > 1
    assert len(found["acceptance_by_position"]) == 4 and min(found["acceptance_by_position"]) > 0.3


def test_every_draft_of_a_model_that_is_its_own_teacher_stands() -> None:
    """Sequences that end in the middle of a round among them: what was not looked at is not counted."""
    with open_pair(4, TEACHER, TEACHER) as pair:
        pair.generate(
            QUESTIONS, SamplingParams.preset("exploratory", seed=1, max_tokens=20), chat=True
        )
        found = pair.statistics()["speculation"]
    assert found["acceptance"] == 1.0 and found["rounds"] < found["verified"] < 4 * found["rounds"]


@pytest.mark.parametrize("preset", ["balanced", "exploratory"])
def test_rows_that_agree_to_rounding_have_alpha_one_half(preset: str) -> None:
    """One model on both sides, read token by token as the base and several tokens at once as the teacher."""
    with open_pair(4, TEACHER, TEACHER, dtype="float32") as pair:
        for temperature in (0.5, 1.0, 10.0):
            params = SamplingParams.preset(preset, seed=1, max_tokens=24, temperature=temperature)
            for completion in pair.generate(QUESTIONS[:6], params, chat=True):
                facts = completion.diagnostics
                drawn = [
                    alpha
                    for alpha, forced in zip(facts.alpha, facts.forced, strict=True)
                    if not forced
                ]
                assert set(drawn) <= {0.5} and max(facts.kl_base) < 1e-8


def test_lock_step_and_drafts_have_one_law() -> None:
    """2,500 sampled continuations, half of them drafted ahead, at different seeds."""
    runs = 1250
    samples = []
    for speculation, seed in (("off", 1), (3, 2)):
        with open_pair(speculation, dtype="float32", max_num_seqs=250) as pair:
            samples.append(continuations(pair, seed, runs))
            if speculation != "off":
                assert pair.statistics()["speculation"]["accepted"] > 3 * runs
    assert min(same_law_ps(*samples).values()) > 0.001

"""The choice of γ against rounds whose times and acceptance are made up, and what it counts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

import pytest

from midlogit.engines.draft_length import MAX_DRAFTS, Acceptance, DraftLength, require_speculation
from midlogit.errors import InvalidRequest

SETTLED = 60  # rounds after which the choice should be a good one
Cost = Callable[[int], float]  # seconds of a round with γ drafts


def play(
    draft_length: DraftLength,
    rounds: int,
    batch: int,
    acceptance: float,
    cost: Cost,
    chance: random.Random,
    slow: float = 1,
) -> list[int]:
    """Rounds whose times are noisy, one in twenty far too long, and all of them by a factor; the γ of each."""
    used = []
    for _ in range(rounds):
        drafts = draft_length.next(batch)
        used.append(drafts)
        stood = [0] * batch
        for n in range(batch):
            while stood[n] < drafts and chance.random() < acceptance:
                stood[n] += 1
        draft_length.record_acceptance(drafts, stood)
        outlier = 6 if chance.random() < 0.05 else 1
        draft_length.record_time(
            batch, drafts, cost(drafts) * chance.lognormvariate(0, 0.05) * outlier * slow
        )
    return used


def speed(used: Sequence[int], acceptance: float, cost: Cost) -> float:
    """Expected tokens a second of a sequence over such rounds."""
    return sum(acceptance**i for drafts in used for i in range(drafts + 1)) / sum(map(cost, used))


def one_sequence(g: int) -> float:
    return 3.4 * (g + 1) + 11.6 + 0.1 * g


def cheap_base(g: int) -> float:
    return 1.0 * (g + 1) + 12 + 0.1 * g


def compute_bound(g: int) -> float:
    return 45 * (g + 1) + 130 + 40 * g


def no_gain(g: int) -> float:
    return 40.0 * (g + 1)


def large_batch(g: int) -> float:
    """An H100 with 256 sequences, in milliseconds, but for what holds rounds up."""
    return 31.0 if g == 0 else 15.0 + 23.0 * g


@pytest.mark.parametrize(
    ("batch", "acceptance", "cost", "choices"),
    [
        (1, 0.88, one_sequence, range(9)),
        (8, 0.88, one_sequence, (0, 2, 3, 4, 5, 6)),
        (1, 0.95, cheap_base, range(9)),
        (1, 0.3, one_sequence, range(9)),
        (1, 0.88, compute_bound, range(9)),
        (64, 0.88, no_gain, range(9)),
    ],
    ids=["one", "vllm", "cheap_base", "disagreeing", "cpu", "no_gain"],
)
def test_auto_finds_a_good_number_of_drafts(
    batch: int, acceptance: float, cost: Cost, choices
) -> None:
    best = max(speed([g], acceptance, cost) for g in choices)
    shares = []
    for seed in range(8):
        chance, draft_length = random.Random(seed), DraftLength("auto", choices)
        play(draft_length, SETTLED, batch, acceptance, cost, chance)
        shares.append(
            speed(play(draft_length, 200, batch, acceptance, cost, chance), acceptance, cost) / best
        )
    assert min(shares) > 0.92 and fmean(shares) > 0.97


def test_auto_goes_to_lock_step_where_drafts_do_not_pay() -> None:
    used: Counter[int] = Counter()
    for seed in range(8):
        draft_length, chance = DraftLength("auto"), random.Random(seed)
        play(draft_length, SETTLED, 64, 0.88, no_gain, chance)
        used.update(play(draft_length, 100, 64, 0.88, no_gain, chance))
    assert used[0] > 0.9 * used.total()
    assert draft_length.statistics()["drafts_in_use"] == {"127": 0}


def test_auto_chooses_for_each_batch_size() -> None:
    draft_length, chance = DraftLength("auto"), random.Random(2)
    for _ in range(2):  # back again: what was measured is kept
        one = play(draft_length, 100, 1, 0.88, one_sequence, chance)
        many = play(draft_length, 100, 64, 0.88, no_gain, chance)
    assert Counter(one).most_common(1)[0][0] >= 3 and Counter(many)[0] > 90
    assert set(draft_length.statistics()["drafts_in_use"]) == {"1", "127"}


def test_auto_follows_when_times_and_acceptance_change() -> None:
    draft_length, chance = DraftLength("auto"), random.Random(3)
    assert Counter(play(draft_length, 200, 1, 0.9, one_sequence, chance)[-50:])[0] <= 1  # a look
    play(draft_length, 1500, 1, 0.15, compute_bound, chance)
    assert Counter(play(draft_length, 100, 1, 0.15, compute_bound, chance))[0] > 85


def test_auto_gets_over_slow_first_rounds_and_counts_the_slow_among_the_others() -> None:
    """The first come behind prompts, and compilers run.

    Of those with drafts, three in ten take nearly twice as long: most are faster than lock-step, together they are not.
    """
    used: Counter[int] = Counter()
    for seed in range(8):
        draft_length, chance = (
            DraftLength("auto", (0, 2, 3, 4, 5, 6), reuses_bonus_row=True),
            random.Random(seed),
        )

        def cost(g: int, chance: random.Random = chance) -> float:
            return large_batch(g) * (1.9 if g and chance.random() < 0.3 else 1)

        for slow in (20, 3, 2):
            play(draft_length, 1, 256, 0.88, cost, chance, slow)
        play(draft_length, SETTLED, 256, 0.88, cost, chance)
        used.update(play(draft_length, 100, 256, 0.88, cost, chance))
    assert used[0] > 0.9 * used.total()


def test_auto_is_not_led_by_a_machine_that_becomes_slower() -> None:
    """What is in use is not taken for slow because the times of the others are older."""
    for cost, good in ((no_gain, (0,)), (one_sequence, (3, 4, 5, 6, 7))):
        used: Counter[int] = Counter()
        for seed in range(8):
            draft_length, chance = DraftLength("auto"), random.Random(seed)
            play(draft_length, SETTLED, 64, 0.88, cost, chance)
            for n in range(100):
                used.update(play(draft_length, 1, 64, 0.88, cost, chance, slow=1 + n / 50))
        assert sum(used[drafts] for drafts in good) > 0.9 * used.total()


def test_auto_counts_what_a_round_leaves_to_the_next() -> None:
    """Texts are written and schedulers told while the device has begun the next round, which waits for that."""
    used: Counter[int] = Counter()
    for seed in range(8):
        draft_length, chance, left = (
            DraftLength("auto", (0, 2, 3, 4, 5, 6), reuses_bonus_row=True),
            random.Random(seed),
            [0.0],
        )

        def cost(g: int, left: list[float] = left) -> float:
            took = left[0] + (30.0 if g == 0 else 10.0 + 15.0 * g)
            left[0] = 0.0 if g == 0 else 20.0 + 10.0 * g
            return took

        play(draft_length, SETTLED, 256, 0.88, cost, chance)
        used.update(play(draft_length, 200, 256, 0.88, cost, chance))
    assert used[0] > 0.9 * used.total()


@pytest.mark.parametrize(
    ("asked", "drafts"), [("off", 0), (0, 0), (3, 3), (MAX_DRAFTS, MAX_DRAFTS)]
)
def test_a_number_fixes_it(asked, drafts: int) -> None:
    draft_length = DraftLength(asked, range(9))
    assert set(play(draft_length, 30, 2, 0.5, no_gain, random.Random(1))) == {drafts}
    assert draft_length.choices == ([drafts] if drafts else [])
    assert draft_length.statistics()["drafts_in_use"] == {"all": drafts}


@pytest.mark.parametrize("drafts", [0, 1, 2, 5])
def test_expected_tokens_of_rounds_whose_last_row_is_carried(drafts: int) -> None:
    """Against rounds that are played: where all drafts stood, the next round's first token is known."""
    chance, acceptance = random.Random(4), Acceptance.empty()
    for place in range(MAX_DRAFTS):
        acceptance.recent[place] = (8e6, 1e7)
    tokens, known, rounds = 0, False, 20_000
    for _ in range(rounds):
        stood = int(known and drafts > 0)
        while stood < drafts and chance.random() < 0.8:
            stood += 1
        tokens += max(min(stood + 1, drafts), 1)
        known = drafts > 0 and stood == drafts
    assert acceptance.tokens(drafts, reuses_bonus_row=True) == pytest.approx(
        tokens / rounds, rel=0.01
    )


@pytest.mark.parametrize("asked", [-1, 17, "fast", True, 2.5, None, ""])
def test_what_cannot_be_asked_for(asked) -> None:
    for take in (require_speculation, DraftLength):
        with pytest.raises(
            InvalidRequest, match=r"speculation is .*Use auto, off, or 0 to 16 drafts per round"
        ):
            take(asked)


def test_statistics_count_what_was_looked_at() -> None:
    draft_length = DraftLength(3)
    assert (
        draft_length.statistics()["acceptance"]
        is draft_length.statistics()["accepted_per_round"]
        is None
    )
    draft_length.record_acceptance(3, [3, 0, 1])
    draft_length.record_acceptance(3, [2], [2])  # ended on its second draft
    draft_length.record_acceptance(0, [0, 0])  # lock-step
    assert draft_length.statistics() == {
        "rounds": 4,
        "verified": 3 + 1 + 2 + 2,
        "accepted": 6,
        "acceptance": 6 / 8,
        "accepted_per_round": 6 / 4,
        "acceptance_by_position": [3 / 4, 2 / 3, 1 / 1],
        "drafts_in_use": {"all": 3},
        "guessed_rounds": 0,
        "guesses_stood": 0,
    }


@pytest.mark.parametrize("slower", [0.6, 3.0])
def test_guesses_pay_by_their_rate_and_the_time_of_their_rounds(slower: float) -> None:
    """A fixed γ of 4 with acceptance 0.88, for eight sequences."""
    draft_length = DraftLength(4, reuses_bonus_row=True)
    chance = random.Random(2)
    assert not draft_length.guesses_pay([1.0] * 8)  # how long rounds take is not known
    play(draft_length, 40, 8, 0.88, one_sequence, chance)
    assert draft_length.guesses_pay([0.95] * 8) and not draft_length.guesses_pay([0.5] * 8)
    assert not draft_length.guesses_pay([0.95] + [0.0] * 7)

    for _ in range(10):
        draft_length.record_time(8, MAX_DRAFTS, slower * one_sequence(4))
    assert draft_length.guesses_pay([0.95] * 8) is (slower < 1)
    assert draft_length.guesses_pay([0.95] * 3 + [0.0] * 5) is (slower < 1)
    assert not draft_length.guesses_pay([0.0] * 8)


def test_auto_learns_nothing_from_drafts_after_guesses() -> None:
    draft_length = DraftLength("auto", reuses_bonus_row=True)
    chance = random.Random(3)
    assert not draft_length.guesses_pay([1.0])
    play(draft_length, SETTLED, 1, 0.6, one_sequence, chance)
    best = draft_length.next(1)
    for _ in range(300):
        draft_length.record_acceptance(MAX_DRAFTS, [MAX_DRAFTS], stood_N=[MAX_DRAFTS - 2])
        draft_length.record_time(1, MAX_DRAFTS, 30.0)
    assert draft_length.statistics()["guesses_stood"] == 300 * (MAX_DRAFTS - 2)
    assert draft_length.guesses_pay([0.95]) and not draft_length.guesses_pay([0.3])
    assert fmean(play(draft_length, 30, 1, 0.6, one_sequence, chance)) < best + 2


@pytest.mark.parametrize("gamma", [0, MAX_DRAFTS])
def test_lockstep_and_the_longest_drafts_have_no_guesses(gamma: int) -> None:
    draft_length = DraftLength(gamma)
    play(draft_length, 40, 1, 0.88, one_sequence, random.Random(4))
    assert not draft_length.guesses_pay([1.0])

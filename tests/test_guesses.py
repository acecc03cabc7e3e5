"""Where guesses come from: prompts, own text and other samples of a prompt; and how long they are kept."""

from __future__ import annotations

import pytest

from midlogit.engines.draft_length import MAX_DRAFTS
from midlogit.engines.vllm import guesses as module
from midlogit.engines.vllm.guesses import NGRAM, NUM_GUESSES, Guesses, read_lengths

PROMPT = tuple(range(100, 140))


def guesses_of(guesses: Guesses, key: str) -> list[int] | None:
    """The guesses after the next token of one sequence; None where there is no source."""
    (rate,) = guesses.rates([key])
    (found,) = guesses.guesses([key])
    assert len(found) == NUM_GUESSES
    return found if rate else None


def test_a_prompt_is_followed_until_it_ends() -> None:
    guesses = Guesses()
    guesses.add("a", PROMPT)
    assert guesses_of(guesses, "a") is None
    guesses.append("a", [7, *PROMPT[10:13]])
    assert guesses_of(guesses, "a") == list(PROMPT[14 : 14 + NUM_GUESSES])
    guesses.append("a", PROMPT[13:38])
    assert guesses_of(guesses, "a") == [139, 138] * (NUM_GUESSES // 2)
    guesses.append("a", PROMPT[38:])
    assert guesses_of(guesses, "a") == list(PROMPT[10 : 10 + NUM_GUESSES])  # 7 followed it before


def test_a_source_is_left_where_texts_differ_and_kept_where_another_is_as_near() -> None:
    guesses = Guesses()
    guesses.add("a", (1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 30, 31, 32, 33))
    guesses.append("a", [1, 2, 3])
    assert guesses_of(guesses, "a")[:3] == [31, 32, 33]  # the latest place
    guesses.append("a", [4])
    assert guesses_of(guesses, "a")[:3] == [6, 7, 8]  # 2, 3, 4 stood in the first
    guesses.append("a", [5, 6, 7, 8, 9, 1, 2, 3])
    assert guesses_of(guesses, "a")[:3] == [31, 32, 33]  # still there, and not at the latest place
    guesses.append("a", [5])
    assert guesses_of(guesses, "a") is None


def test_own_text_that_repeats_goes_on_repeating() -> None:
    guesses = Guesses()
    guesses.add("a", (1,))
    guesses.append("a", [2, 3, 2, 3, 2])
    assert guesses_of(guesses, "a") == [2, 3] * (NUM_GUESSES // 2)


def test_other_samples_of_a_prompt_are_followed_and_others_are_not() -> None:
    guesses = Guesses()
    for key, prompt in (("a", PROMPT), ("b", PROMPT), ("other", PROMPT[::-1])):
        guesses.add(key, prompt)
    guesses.append("a", range(20))
    guesses.append("b", [0])
    guesses.append("other", range(5))
    guesses.rates(["a"])
    assert guesses_of(guesses, "b") == list(
        range(2, 2 + NUM_GUESSES)
    )  # its prompt ends as that of a
    assert guesses_of(guesses, "other") is None
    guesses.append("b", range(1, 20))
    assert guesses_of(guesses, "b") is None  # as far as a itself
    guesses.append("a", [20])
    guesses.append("b", [20])
    guesses.append("b", [30])  # no hit: nobody expected it
    guesses.append("a", [40, 41, 42])
    assert guesses_of(guesses, "b") is None

    guesses.forget(["a"])
    guesses.add("c", PROMPT)
    assert guesses_of(guesses, "c")[:3] == [1, 2, 3]  # as long as a sample of the prompt is there
    guesses.forget(["b", "c"])
    guesses.add("d", PROMPT)
    assert guesses_of(guesses, "d") is None


def test_a_prompt_that_is_always_asked_keeps_a_bounded_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "KEPT", 300)
    guesses = Guesses()
    guesses.add("0", PROMPT)
    for n in range(1, 50):
        guesses.add(str(n), PROMPT)
        guesses.append(str(n - 1), range(1000 * n, 1000 * n + 50))
        guesses.rates([str(n - 1)])
        guesses.forget([str(n - 1)])
        assert len(guesses._prompts[PROMPT].places) < 300 + len(PROMPT) + 51
    guesses.append("49", PROMPT[:NGRAM])
    assert guesses_of(guesses, "49") is not None


def test_the_rate_of_hits_falls_and_rises() -> None:
    guesses = Guesses()
    guesses.add("a", PROMPT)
    guesses.append("a", PROMPT[:NGRAM])
    (before,) = guesses.rates(["a"])
    guesses.append("a", PROMPT[NGRAM:30])
    (after,) = guesses.rates(["a"])
    assert before < after < 1
    guesses.append("a", [7, *PROMPT[:NGRAM]])
    assert guesses.rates(["a"]) < [after]


def test_what_steps_may_read() -> None:
    assert read_lengths([2, 3], has_adapter=False) == ((NUM_GUESSES,), [2, 3, MAX_DRAFTS])
    assert read_lengths([2, 3], has_adapter=True) == ((), [2, 3])
    assert read_lengths([], has_adapter=False) == ((), [])

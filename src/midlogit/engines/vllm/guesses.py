"""Guesses at the next tokens of sequences: what followed when their last tokens stood somewhere before.

Knows tokens, no model and no step. It looks in the base's prompt, in the sequence's own text and in those of the other
samples of the prompt. A guess spares a forward pass of the base if it is the base's draft; it changes no token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from midlogit.engines.draft_length import MAX_DRAFTS

NUM_GUESSES = MAX_DRAFTS - 2  # per round; two drafts need none
MAX_BATCH = 24  # sequences: the teacher's read of more has no CUDA graph, since vLLM captures up to 512 tokens
NGRAM = 3  # last tokens that must have stood there before
PAST = 0.9  # factor per token for older hits
FIRST_RATE = 0.7  # hits assumed before the first
KEPT = 100_000  # places in texts of samples that are kept beside those of their prompt, while others of them run


def read_lengths(
    draft_lengths: Sequence[int], has_adapter: bool
) -> tuple[Sequence[int], Sequence[int]]:
    """The numbers of drafts that a step of (base, teacher) reads: guesses, and those of rounds with guesses.

    Args:
        draft_lengths: the γ above 0 of rounds without guesses.
        has_adapter: whether a model has an adapter: vLLM would take the longest read for that of all sequences at once.
    """
    if not draft_lengths or has_adapter:
        return (), draft_lengths
    return (NUM_GUESSES,), sorted({*draft_lengths, MAX_DRAFTS})


@dataclass(slots=True)
class SharedPrompt:
    """A prompt and the texts of its samples.

    Attributes:
        places: where n-grams stood last: the text, and the place of the token that followed.
    """

    ids: tuple[int, ...]
    num_sequences: int = 0
    places: dict[tuple[int, ...], tuple[Sequence[int], int]] = field(default_factory=dict)

    def index(self, text: Sequence[int], first: int, end: int) -> None:
        """Notes the n-grams of a text before the places from `first` to `end`."""
        first = max(first, NGRAM)
        if first < end:
            columns = [text[first - NGRAM + n : end - NGRAM + n] for n in range(NGRAM)]
            self.places.update(
                zip(zip(*columns, strict=True), zip(repeat(text), range(first, end)), strict=True)
            )


@dataclass(slots=True)
class GuessedText:
    """The text of a sequence, and a place in it or in another text from which it goes on alike.

    Attributes:
        ids: the last tokens of the prompt, then the sequence's own.
        num_indexed: places of it that are indexed.
        source, place: the other text and the place of the next token there; an empty text where there is none.
        rate: the share of hits, recent ones above all: tokens that were those of the source.
    """

    prompt: SharedPrompt
    ids: list[int]
    num_indexed: int = 0
    source: Sequence[int] = ()
    place: int = 0
    rate: float = FIRST_RATE

    def append(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens, and leaves a source that has others."""
        for token_id in token_ids:
            is_hit = False
            if self.place < len(self.source):
                is_hit = self.source[self.place] == token_id
                self.rate = PAST * self.rate + (1 - PAST) * is_hit
            self.source, self.place = (self.source, self.place + 1) if is_hit else ((), 0)
            self.ids.append(token_id)

    def index(self) -> None:
        """Indexes the places that have a token."""
        self.prompt.index(self.ids, self.num_indexed, len(self.ids))
        self.num_indexed = len(self.ids)

    def follow(self) -> bool:
        """Whether there is a source with a next token; looks for one where there is none."""
        if self.place >= len(self.source):
            last_ids = tuple(self.ids[-NGRAM:])
            self.source, self.place = self.prompt.places.get(last_ids, ((), 0))
        return bool(self.source)

    def guesses(self) -> list[int]:
        """The tokens after the next one; a source that ends too early repeats."""
        ahead = list(self.source[self.place : self.place + 1 + NUM_GUESSES])
        return (ahead * (1 + NUM_GUESSES))[1 : 1 + NUM_GUESSES] or [0] * NUM_GUESSES


class Guesses:
    """The texts of all sequences; texts of equal prompts share what they know."""

    def __init__(self) -> None:
        self._prompts: dict[tuple[int, ...], SharedPrompt] = {}
        self._texts: dict[str, GuessedText] = {}

    def add(self, key: str, prompt_ids: tuple[int, ...]) -> None:
        """Begins the text of a sequence."""
        prompt = self._prompts.setdefault(prompt_ids, SharedPrompt(prompt_ids))
        prompt.num_sequences += 1
        self._texts[key] = GuessedText(prompt, list(prompt_ids[-NGRAM:]))

    def append(self, key: str, token_ids: Sequence[int]) -> None:
        """Takes the next tokens of a sequence."""
        self._texts[key].append(token_ids)

    def forget(self, keys: Collection[str]) -> None:
        """Drops sequences, prompts of which none is left, and places of prompts that have too many."""
        for key in keys:
            prompt = self._texts.pop(key).prompt
            prompt.num_sequences -= 1
            if not prompt.num_sequences:
                del self._prompts[prompt.ids]
            elif len(prompt.places) > len(prompt.ids) + KEPT:
                prompt.places.clear()

    def rates(self, keys: Sequence[str]) -> list[float]:
        """The probability that each sequence's next token is that of its source, 0 where there is no source."""
        texts = [self._texts[key] for key in keys]
        for text in texts:
            if not text.prompt.places:
                text.prompt.index(text.prompt.ids, 0, len(text.prompt.ids))
            text.index()
        return [text.rate if text.follow() else 0.0 for text in texts]

    def guesses(self, keys: Sequence[str]) -> list[list[int]]:
        """NUM_GUESSES guesses for each sequence, at the tokens after its next one; zeros where there is no source."""
        texts = [self._texts[key] for key in keys]
        return [text.guesses() for text in texts]

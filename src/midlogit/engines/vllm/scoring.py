"""The part of the vLLM engine that scores given text, as sequences among the others; knows no step."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from midlogit.engines.base import Scoring
from midlogit.engines.vllm.given import GivenSequence
from midlogit.engines.vllm.transfer import TransferEngine
from midlogit.requests.scoring import Scored


class ScoringEngine(TransferEngine, Scoring):
    """Takes texts to score."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._given: WeakValueDictionary[int, GivenSequence] = WeakValueDictionary()  # by text

    def score(self, texts: list[Scored]) -> None:
        given = [GivenSequence(text) for text in texts if text.request.given]
        self._given.update((id(sequence.text), sequence) for sequence in given)
        self._take([*given])
        for text in texts:
            if not text.request.given:
                text.finish([])

    def forget(self, texts: list[Scored]) -> None:
        given = [self._given.get(id(text)) for text in texts]
        self._drop([sequence for sequence in given if sequence is not None], silently=True)

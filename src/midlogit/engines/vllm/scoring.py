"""Given texts that two engine cores score: which are under way, and what is decided of those that both have read.

Knows texts and their rows. `Core` knows vLLM, the decider knows α and q, `Lockstep` knows the order of a step. The
prompts of both sides differ in length, and the cores compute them in chunks of their own, among the tokens of what is
generated. Each core keeps the hidden states of a text's rows until the other has them too (docs/vllm.md).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from midlogit.decide.base import Decided, Decider, LogitRows
from midlogit.engines.vllm.core import Core
from midlogit.engines.vllm.memory import SCORED_ROWS, SCORED_TOKENS
from midlogit.outputs import Decision
from midlogit.requests.scoring import Scored


@dataclass(frozen=True, slots=True)
class DecidedTexts:
    """Texts whose decisions are enqueued.

    Attributes:
        texts: by key. slices: the decisions of their given tokens, one text after the other.
    """

    texts: dict[str, Scored]
    slices: list[Decided]

    def decisions(self) -> Iterator[tuple[str, list[Decision]]]:
        """Each text's key and decisions; waits for the device."""
        all_decisions = chain.from_iterable(one.decisions() for one in self.slices)
        for key, text in self.texts.items():
            yield key, list(islice(all_decisions, text.request.given))


class TextScorer:
    """Scores given texts on two engine cores.

    Args:
        cores: base and teacher.
        decider: decides rows of logits on their device.

    Attributes:
        publish: called with texts in the step after that which has decided them, while the device works on; None on
            ranks that no one asks.
    """

    def __init__(self, cores: tuple[Core, Core], decider: Decider) -> None:
        self._cores, self._decider = cores, decider
        self.publish: Callable[[DecidedTexts], None] | None = None
        self._waiting: dict[str, Scored] = {}
        self._running: dict[str, Scored] = {}
        self._decided = DecidedTexts({}, [])

    @property
    def is_empty(self) -> bool:
        """Whether every text is decided."""
        return not self._waiting and not self._running

    @property
    def running_keys(self) -> list[str]:
        """The texts that the cores have."""
        return list(self._running)

    def add(self, key: str, text: Scored) -> None:
        """Takes a text, of which at least one token is given."""
        self._waiting[key] = text
        self._start()

    def forget(self, keys: Collection[str]) -> None:
        """Drops texts, waiting or running; the cores have let go of them."""
        for key in keys:
            self._waiting.pop(key, None)
            self._running.pop(key, None)

    def begin_again(self) -> None:
        """Has the running texts computed from their first token on, so that one version of the weights scores each."""
        for core in self._cores:
            core.abort(self._running)
        self._waiting = self._running | self._waiting
        self._running = {}
        self._start()

    def step(self) -> None:
        """Enqueues the decisions of texts that both cores have read; publishes those of the step before."""
        before, self._decided = self._decided, self._decide()
        self._start()
        if before.texts and self.publish is not None:
            self.publish(before)

    def _start(self) -> None:
        """Gives texts to the cores, as many as their hidden states may be kept of."""
        num_tokens = sum(text.request.given for text in self._running.values())
        while self._waiting:
            key, text = next(iter(self._waiting.items()))
            request = text.request
            num_tokens += request.given
            if self._running and num_tokens > SCORED_TOKENS:
                break
            self._running[key] = self._waiting.pop(key)
            for core, ids in zip(self._cores, (request.base_ids, request.teacher_ids), strict=True):
                core.add_text(key, ids, request.given)

    def _decide(self) -> DecidedTexts:
        base, teacher = self._cores
        keys = [key for key in self._running if all(core.texts.has(key) for core in self._cores)]
        texts = {key: self._running.pop(key) for key in keys}
        if not texts:
            return DecidedTexts({}, [])

        settings = [row for text in texts.values() for row in text.settings]
        base_NH, teacher_NH = (
            _joined([core.texts.pop(key) for key in keys]) for core in self._cores
        )
        slices = []
        for first in range(0, len(settings), SCORED_ROWS):
            some = slice(first, first + SCORED_ROWS)
            rows = (
                _all_rows(base.logits_of(base_NH[some])),
                _all_rows(teacher.logits_of(teacher_NH[some])),
            )
            slices.append(self._decider.decide(*rows, settings[some]))
        return DecidedTexts(texts, slices)


def _joined(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states)


def _all_rows(logits_NW: Tensor) -> LogitRows:
    return LogitRows(logits_NW, range(len(logits_NW)))

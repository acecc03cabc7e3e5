"""The hidden states of one model at the tokens of given texts, as their prompts are computed; knows no scheduler."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from midlogit.engines.vllm.runner import Runner

BlockHasher = Callable[[Any], list[bytes]]  # of a vLLM request's full blocks that have no hash yet


@dataclass(slots=True)
class Reading:
    """The states of one text so far.

    Attributes:
        first: position of the first one that is kept.
        count: how many are kept, P of them.
        num_read: how many of them are there.
        states_PH: the states; None before the first is there.
    """

    first: int
    count: int
    num_read: int = 0
    states_PH: Tensor | None = None

    def take(self, position: int, states_QH: Tensor) -> None:
        """Copies the states that are not there yet out of those that a step computed.

        A request that was preempted is computed again: then some of them are there already.

        Args:
            position: of the first of Q successive states.
        """
        if self.states_PH is None:
            self.states_PH = states_QH.new_empty((self.count, states_QH.shape[1]))
        skipped = self.first + self.num_read - position
        new_QH = states_QH[skipped:]
        assert skipped >= 0, "given tokens were taken from the prefix cache"
        self.states_PH[self.num_read : self.num_read + len(new_QH)] = new_QH
        self.num_read += len(new_QH)


class TextStates:
    """The states of all texts that a core reads.

    Args:
        runner: of the core.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._readings: dict[str, Reading] = {}
        self._read: dict[str, Tensor] = {}
        self._numbers = itertools.count()

    def add(self, key: str, first: int, count: int) -> int:
        """Has the states of a request kept, from a position on; its prompt ends with the last of them.

        Returns:
            A number that no text before it has.
        """
        self._readings[key] = Reading(first, count)
        return next(self._numbers)

    def collect(self, scheduled: Collection[str]) -> list[str]:
        """Takes states from the step that was executed last.

        Args:
            scheduled: the requests of the step.

        Returns:
            The texts of which all states are there now.
        """
        read = []
        for key, reading in self._readings.items():
            if key in scheduled:
                reading.take(*self._runner.hidden_states(key))
                if reading.num_read == reading.count:
                    read.append(key)
        for key in read:
            states_PH = self._readings.pop(key).states_PH
            assert states_PH is not None
            self._read[key] = states_PH
        return read

    def has(self, key: str) -> bool:
        """Whether all states of a text are there."""
        return key in self._read

    def pop(self, key: str) -> Tensor:
        """The states of a text, which are not kept any longer."""
        return self._read.pop(key)

    def drop(self, keys: Collection[str]) -> None:
        """Forgets those of the requests that are texts."""
        for key in keys:
            self._readings.pop(key, None)
            self._read.pop(key, None)


def apart_from(hasher: BlockHasher, shared: int, number: int) -> BlockHasher:
    """Hashes of a request's blocks, which after the first `shared` no request of another number has."""
    suffix = str(number).encode()

    def hashes(request: Any) -> list[bytes]:
        known = len(request.block_hashes)
        return [
            block_hash if known + n < shared else block_hash + suffix
            for n, block_hash in enumerate(hasher(request))
        ]

    return hashes

"""The decision by arrays, for rows of torch buffers: at once, on the device of the rows.

Knows buffers and positions; the mathematics is that of arrays.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from midlogit.decide.arrays import decide, draft
from midlogit.decide.base import BonusRows, Decided, Decider, DraftRound, LogitRows, RowSettings
from midlogit.decide.transfer import to_device
from midlogit.outputs import Decision

LOGITS = 2**24  # of one model that are decided together: so many float64 are 128 MiB


class ArrayDecider(Decider):
    """Decides with arrays, and waits for the device.

    Args:
        vocabulary: ids below it are drawn.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def decide(
        self, base: LogitRows, teacher: LogitRows, settings: Sequence[RowSettings]
    ) -> Decided:
        rows = max(1, LOGITS // teacher.logits_RV.shape[1])
        decisions: list[Decision] = []
        for first in range(0, len(settings), rows):
            some = slice(first, first + rows)
            base_NV, teacher_NV = (
                take_rows(LogitRows(side.logits_RV, side.rows[some])) for side in (base, teacher)
            )
            decisions += decide(base_NV, teacher_NV, settings[some])
        return ArrayDecided(decisions, self._vocabulary, teacher.logits_RV.device)

    def start_round(self, settings: Sequence[RowSettings], num_sequences: int) -> DraftRound:
        return ArrayRound(settings, num_sequences, self._vocabulary)


class ArrayDecided(Decided):
    """Decisions that are there already."""

    def __init__(self, decisions: list[Decision], vocabulary: int, device: torch.device) -> None:
        self._decisions, self._vocabulary, self._device = decisions, vocabulary, device

    @property
    def tokens_N(self) -> Tensor:
        shared = [shared_id(token_id, self._vocabulary) for token_id in self.token_ids()]
        return to_device(shared, self._device)

    def token_ids(self) -> list[int]:
        return [decision.token_id for decision in self._decisions]

    def decisions(self) -> list[Decision]:
        return self._decisions


class ArrayRound(DraftRound):
    """A round of drafts by arrays."""

    def __init__(
        self, settings: Sequence[RowSettings], num_sequences: int, vocabulary: int
    ) -> None:
        self._settings, self._num_sequences, self._vocabulary = settings, num_sequences, vocabulary
        self._base_NV: list[Tensor] = []  # of the positions drafted together

    def draft(self, base: LogitRows, bonus: BonusRows | None = None) -> Tensor:
        base_NV = take_rows(base)
        if base_NV is base.logits_RV:
            base_NV = base_NV.clone()  # the buffer is written again before the decision
        first = sum(map(len, self._base_NV))
        settings = self._settings[first : first + len(base_NV)]
        self._base_NV.append(base_NV)

        tokens = draft(base_NV, settings, self._vocabulary)
        if bonus is not None:
            teacher_MV = take_rows(LogitRows(bonus.logits_MV, range(len(bonus.sequences))))
            decisions = decide(
                base_NV[list(bonus.sequences)], teacher_MV, [settings[n] for n in bonus.sequences]
            )
            for n, decision in zip(bonus.sequences, decisions, strict=True):
                tokens[n] = shared_id(decision.token_id, self._vocabulary)
        return to_device(tokens, base_NV.device)

    def decide(self, teacher: LogitRows) -> Decided:
        base_NV = torch.cat(self._base_NV)
        num_positions = len(base_NV) // self._num_sequences
        rows = [row + position for position in range(num_positions) for row in teacher.rows]
        teacher_NV = take_rows(LogitRows(teacher.logits_RV, rows))
        decisions = decide(base_NV, teacher_NV, self._settings)
        return ArrayDecided(decisions, self._vocabulary, teacher_NV.device)


def take_rows(some: LogitRows) -> Tensor:
    """The rows [N, V] in float32, or in float64 where they are that; the buffer itself where it is all of it."""
    logits_NV = some.logits_RV
    if list(some.rows) != list(range(len(logits_NV))):
        logits_NV = logits_NV[to_device(some.rows, logits_NV.device)]
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def shared_id(token_id: int, vocabulary: int) -> int:
    """The id for both models to read next: 0 in place of a stop id that only one of them has."""
    return token_id if token_id < vocabulary else 0

"""The draws of one step on vLLM's logits: guesses after each forward of the base, decisions after that of the teacher.

Knows rows of two models and the policy, as arrays and as fused kernels; not which request a row belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from midlogit.decide.arrays import decide, draft
from midlogit.decide.base import RowSettings
from midlogit.decide.transfer import to_device
from midlogit.outputs import Decision

if TYPE_CHECKING:
    from midlogit.decide.kernels.decider import FusedPolicy, Pending, Prepared

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Known:
    """The teacher's rows behind some sequences, known before the base's.

    Attributes:
        numbers: which of the sequences, M of them. teacher_MV: raw logits.
    """

    numbers: Sequence[int]
    teacher_MV: Tensor


class Drawing(ABC):
    """The tokens of N sequences: of one place by `draw`, or of P successive ones by P calls of `guess` and `decide`.

    Results are asked for afterwards, in order of places, N at each.
    """

    @abstractmethod
    def draw(self, base_RV: Tensor, base_rows: Sequence[int], teacher_RV: Tensor, teacher_rows: Sequence[int]) -> None:
        """Draws the token of each sequence from its rows of both models' logits."""

    @abstractmethod
    def guess(self, logits_RV: Tensor, rows: Sequence[int], known: Known | None = None) -> Tensor:
        """Takes the base's logits at the next place, at these rows.

        Returns:
            the guessed tokens [N] on the device: what is drawn where the teacher's row is known too, else the base's
            draft.
        """

    @abstractmethod
    def decide(self, logits_RV: Tensor, rows: Sequence[int]) -> None:
        """Takes the teacher's logits, whose rows for a sequence's places follow each other from these on."""

    @abstractmethod
    def tokens(self) -> Tensor:
        """What was drawn [P * N], on the device, for work enqueued later."""

    @abstractmethod
    def token_ids(self) -> list[int]:
        """What was drawn; waits for the device."""

    @abstractmethod
    def decisions(self) -> list[Decision]:
        """All that is known of what was drawn."""


class ArrayDrawing(Drawing):
    """By the policy's own arrays, at once.

    Args:
        settings: of all places, N at each. sequences: N.
    """

    def __init__(self, settings: Sequence[RowSettings], sequences: int, vocabulary: int) -> None:
        self._settings, self._sequences, self._vocabulary = settings, sequences, vocabulary
        self._base_rows: list[Tensor] = []
        self._made: list[Decision] = []
        self._device: torch.device

    def draw(self, base_RV: Tensor, base_rows: Sequence[int], teacher_RV: Tensor, teacher_rows: Sequence[int]) -> None:
        self._base_rows = [self._taken(base_RV, base_rows)]
        self.decide(teacher_RV, teacher_rows)

    def guess(self, logits_RV: Tensor, rows: Sequence[int], known: Known | None = None) -> Tensor:
        rows_NV = self._taken(logits_RV, rows)
        start = len(self._base_rows) * self._sequences
        settings = self._settings[start : start + self._sequences]
        self._base_rows.append(rows_NV)
        tokens = draft(rows_NV, settings, self._vocabulary)
        if known is not None:
            teacher_MV = self._taken(known.teacher_MV, range(len(known.numbers)))
            some = decide(rows_NV[list(known.numbers)], teacher_MV, [settings[n] for n in known.numbers])
            for n, decision in zip(known.numbers, some, strict=True):
                tokens[n] = self._fed(decision.token_id)
        return to_device(tokens, logits_RV.device)

    def decide(self, logits_RV: Tensor, rows: Sequence[int]) -> None:
        places = range(len(self._base_rows))
        teacher_NV = self._taken(logits_RV, [row + place for place in places for row in rows])
        self._made = decide(torch.cat(self._base_rows), teacher_NV, self._settings)
        self._device = logits_RV.device

    def tokens(self) -> Tensor:
        return to_device([self._fed(token_id) for token_id in self.token_ids()], self._device)

    def _fed(self, token_id: int) -> int:
        """The id for the models to read next: one that both have, in place of a stop id that only one has."""
        return token_id if token_id < self._vocabulary else 0

    def _taken(self, logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
        return logits_RV[to_device(rows, logits_RV.device)].to(torch.promote_types(logits_RV.dtype, torch.float32))

    def token_ids(self) -> list[int]:
        return [decision.token_id for decision in self._made]

    def decisions(self) -> list[Decision]:
        return self._made


class KernelDrawing(Drawing):
    """By the fused kernels; everything is enqueued, and comes back in one transfer.

    Args:
        settings: of all places, N at each, all of which `policy` handles. sequences: N.
    """

    def __init__(self, policy: FusedPolicy, settings: Sequence[RowSettings], sequences: int) -> None:
        self._policy, self._settings, self._sequences = policy, settings, sequences
        self._place = 0
        self._rows: Sequence[int] = ()
        self._rows_N: Tensor
        self._base_NV: Tensor
        self._prepared: Prepared
        self._drafts_NC: Tensor
        self._pending: Pending

    def draw(self, base_RV: Tensor, base_rows: Sequence[int], teacher_RV: Tensor, teacher_rows: Sequence[int]) -> None:
        prepared = self._policy.prepare(self._settings, base_rows, teacher_rows)
        self._pending = self._policy.launch(base_RV, teacher_RV, prepared)

    def guess(self, logits_RV: Tensor, rows: Sequence[int], known: Known | None = None) -> Tensor:
        if self._place == 0:
            self._base_NV = logits_RV.new_empty((len(self._settings), logits_RV.shape[1]))
            self._drafts_NC = self._policy.drafts(len(self._settings))
            self._prepared = self._policy.prepare(self._settings)
        some = slice(self._place * self._sequences, (self._place + 1) * self._sequences)
        if rows != self._rows:
            self._rows, self._rows_N = rows, to_device(rows, logits_RV.device)
        torch.index_select(logits_RV, 0, self._rows_N, out=self._base_NV[some])
        tokens_N = self._policy.draft(self._base_NV, self._prepared, self._drafts_NC, some)
        if known is not None:
            numbers = [some.start + n for n in known.numbers]
            few = self._prepared.some(numbers, to_device(numbers, logits_RV.device))
            drawn = self._policy.launch(self._base_NV, known.teacher_MV, few, self._drafts_NC)
            tokens_N[to_device(known.numbers, logits_RV.device)] = drawn.tokens_N
        self._place += 1
        return tokens_N

    def decide(self, logits_RV: Tensor, rows: Sequence[int]) -> None:
        teacher_rows = [row + place for place in range(self._place) for row in rows]
        self._prepared.teacher_at(to_device(teacher_rows, logits_RV.device))
        self._pending = self._policy.launch(self._base_NV, logits_RV, self._prepared, self._drafts_NC)

    def tokens(self) -> Tensor:
        return self._pending.tokens_N

    def token_ids(self) -> list[int]:
        return self._pending.token_ids()

    def decisions(self) -> list[Decision]:
        return self._pending.decisions()


class SplitDrawing(Drawing):
    """Some sequences one way, the others another.

    Args:
        parts: the numbers of some of the sequences, and the drawing of those; every sequence is in one.
    """

    def __init__(self, parts: Sequence[tuple[list[int], Drawing]]) -> None:
        self._parts = parts

    def draw(self, base_RV: Tensor, base_rows: Sequence[int], teacher_RV: Tensor, teacher_rows: Sequence[int]) -> None:
        for numbers, part in self._parts:
            part.draw(base_RV, [base_rows[n] for n in numbers], teacher_RV, [teacher_rows[n] for n in numbers])

    def guess(self, logits_RV: Tensor, rows: Sequence[int], known: Known | None = None) -> Tensor:
        tokens_N = torch.empty(len(rows), dtype=torch.int64, device=logits_RV.device)
        for numbers, part in self._parts:
            guessed_M = part.guess(logits_RV, [rows[n] for n in numbers], _some(known, numbers))
            tokens_N[to_device(numbers, logits_RV.device)] = guessed_M
        return tokens_N

    def decide(self, logits_RV: Tensor, rows: Sequence[int]) -> None:
        for numbers, part in self._parts:
            part.decide(logits_RV, [rows[n] for n in numbers])

    def tokens(self) -> Tensor:
        parts = [part.tokens() for _, part in self._parts]
        starts = accumulate((len(tokens_M) for tokens_M in parts), initial=0)
        order = self._joined([list(range(at, at + len(tokens_M))) for at, tokens_M in zip(starts, parts, strict=False)])
        return torch.cat(parts)[to_device(order, parts[0].device)]

    def token_ids(self) -> list[int]:
        return self._joined([part.token_ids() for _, part in self._parts])

    def decisions(self) -> list[Decision]:
        return self._joined([part.decisions() for _, part in self._parts])

    def _joined(self, found: list[list[T]]) -> list[T]:
        """Results of the parts in the order of places and sequences."""
        sequences = sum(len(numbers) for numbers, _ in self._parts)
        joined = {
            at // len(numbers) * sequences + numbers[at % len(numbers)]: result
            for (numbers, _), results in zip(self._parts, found, strict=True)
            for at, result in enumerate(results)
        }
        return [joined[at] for at in range(len(joined))]


def _some(known: Known | None, numbers: Sequence[int]) -> Known | None:
    """What is known of some of the sequences, which get new numbers in this order."""
    order = {} if known is None else {number: row for row, number in enumerate(known.numbers)}
    there = [n for n, number in enumerate(numbers) if number in order]
    if known is None or not there:
        return None
    rows = [order[numbers[n]] for n in there]
    return Known(there, known.teacher_MV[to_device(rows, known.teacher_MV.device)])

"""Rows of one step that are decided in two ways: takes the inputs apart and puts the results together again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from midlogit.decide.base import BonusRows, Decided, DraftRound, LogitRows
from midlogit.decide.transfer import to_device
from midlogit.outputs import Decision

T = TypeVar("T")


class SplitDecided(Decided):
    """Results of parts.

    Args:
        parts: the numbers of some of N sequences, and their results, position by position. Every sequence is in one
            part, and all have the same number of positions.
    """

    def __init__(self, parts: Sequence[tuple[list[int], Decided]]) -> None:
        self._parts = parts

    @property
    def tokens_N(self) -> Tensor:
        parts = [decided.tokens_N for _, decided in self._parts]
        ends = list(accumulate(len(tokens_M) for tokens_M in parts))
        order = self._join(
            [
                list(range(end - len(tokens_M), end))
                for end, tokens_M in zip(ends, parts, strict=True)
            ]
        )
        return torch.cat(parts)[to_device(order, parts[0].device)]

    def token_ids(self) -> list[int]:
        return self._join([decided.token_ids() for _, decided in self._parts])

    def decisions(self) -> list[Decision]:
        return self._join([decided.decisions() for _, decided in self._parts])

    def _join(self, results: list[list[T]]) -> list[T]:
        """Results of the parts in the order of positions and sequences."""
        num_sequences = sum(len(sequences) for sequences, _ in self._parts)
        joined: dict[int, T] = {}
        for (sequences, _), some in zip(self._parts, results, strict=True):
            for i, result in enumerate(some):
                position, n = divmod(i, len(sequences))
                joined[position * num_sequences + sequences[n]] = result
        return [joined[i] for i in range(len(joined))]


class SplitRound(DraftRound):
    """A round of drafts in parts.

    Args:
        parts: the numbers of some of the sequences, and their round; every sequence is in one.
    """

    def __init__(self, parts: Sequence[tuple[list[int], DraftRound]]) -> None:
        self._parts = parts

    def draft(self, base: LogitRows, bonus: BonusRows | None = None) -> Tensor:
        device = base.logits_RV.device
        num_sequences = sum(len(sequences) for sequences, _ in self._parts)
        tokens_N = torch.empty(len(base.rows), dtype=torch.int64, device=device)
        for sequences, part in self._parts:
            firsts = range(0, len(base.rows), num_sequences)
            numbers = [first + n for first in firsts for n in sequences]
            tokens_M = part.draft(some_rows(base, numbers), _some_bonus(bonus, sequences))
            tokens_N[to_device(numbers, device)] = tokens_M
        return tokens_N

    def decide(self, teacher: LogitRows) -> Decided:
        return SplitDecided(
            [
                (sequences, part.decide(some_rows(teacher, sequences)))
                for sequences, part in self._parts
            ]
        )


def some_rows(rows: LogitRows, numbers: Sequence[int]) -> LogitRows:
    """The rows with these numbers, of the same buffer."""
    return LogitRows(rows.logits_RV, [rows.rows[n] for n in numbers])


def _some_bonus(bonus: BonusRows | None, sequences: Sequence[int]) -> BonusRows | None:
    """The bonus rows of some of the sequences, which are numbered anew in this order."""
    row_of = (
        {} if bonus is None else {sequence: row for row, sequence in enumerate(bonus.sequences)}
    )
    numbers = [n for n, sequence in enumerate(sequences) if sequence in row_of]
    if bonus is None or not numbers:
        return None
    rows = [row_of[sequences[n]] for n in numbers]
    return BonusRows(numbers, bonus.logits_MV[to_device(rows, bonus.logits_MV.device)])

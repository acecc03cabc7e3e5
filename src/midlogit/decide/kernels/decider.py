"""The decision by kernels, and by arrays in rows whose settings the kernels do not handle.

Knows the buffers of a step and its positions; what the kernels are given is up to launch.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from midlogit.decide.array_decider import ArrayDecider
from midlogit.decide.base import BonusRows, Decided, Decider, DraftRound, LogitRows, RowSettings
from midlogit.decide.kernels.compiling import compile_kernels
from midlogit.decide.kernels.launch import KernelLauncher, handles
from midlogit.decide.kernels.split import SplitDecided, SplitRound, some_rows
from midlogit.decide.transfer import to_device


class KernelDecider(Decider):
    """Enqueues the decision of all rows; the results come back in one transfer.

    Args:
        vocabulary: ids below it are drawn; columns beyond count as mass of their model.
        device: of the logits.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._launcher = KernelLauncher(vocabulary, device)
        self._arrays = ArrayDecider(vocabulary)

    def warm_up(self, base_1V: Tensor, teacher_1V: Tensor) -> None:
        compile_kernels(self._vocabulary, base_1V, teacher_1V)

    def decide(
        self, base: LogitRows, teacher: LogitRows, settings: Sequence[RowSettings]
    ) -> Decided:
        parts: list[tuple[list[int], Decided]] = []
        for rows, by_kernels in _ways(settings):
            some = some_rows(base, rows), some_rows(teacher, rows), [settings[n] for n in rows]
            parts.append((rows, self._enqueue(*some) if by_kernels else self._arrays.decide(*some)))
        return parts[0][1] if len(parts) == 1 else SplitDecided(parts)

    def start_round(self, settings: Sequence[RowSettings], num_sequences: int) -> DraftRound:
        parts: list[tuple[list[int], DraftRound]] = []
        for sequences, by_kernels in _ways(settings[:num_sequences]):
            firsts = range(0, len(settings), num_sequences)
            some = [settings[first + n] for first in firsts for n in sequences]
            if by_kernels:
                parts.append((sequences, KernelRound(self._launcher, some, len(sequences))))
            else:
                parts.append((sequences, self._arrays.start_round(some, len(sequences))))
        return parts[0][1] if len(parts) == 1 else SplitRound(parts)

    def _enqueue(
        self, base: LogitRows, teacher: LogitRows, settings: Sequence[RowSettings]
    ) -> Decided:
        prepared = self._launcher.prepare(settings, base.rows, teacher.rows)
        return self._launcher.launch(base.logits_RV, teacher.logits_RV, prepared)


class KernelRound(DraftRound):
    """A round of drafts by kernels, which handle all of the settings."""

    def __init__(
        self, launcher: KernelLauncher, settings: Sequence[RowSettings], num_sequences: int
    ) -> None:
        self._launcher, self._num_sequences = launcher, num_sequences
        self._prepared = launcher.prepare(settings)
        self._drafts_RC = launcher.allocate_drafts(len(settings))
        self._num_drafted = 0
        self._base_RV: Tensor | None = None  # the base's rows of all positions
        self._rows: Sequence[int] = ()
        self._rows_N: Tensor

    def draft(self, base: LogitRows, bonus: BonusRows | None = None) -> Tensor:
        device = base.logits_RV.device
        if self._base_RV is None:
            self._base_RV = base.logits_RV.new_empty(
                (len(self._prepared.settings), base.logits_RV.shape[1])
            )
        if base.rows != self._rows:
            self._rows, self._rows_N = base.rows, to_device(base.rows, device)
        here = slice(self._num_drafted, self._num_drafted + len(base.rows))
        torch.index_select(base.logits_RV, 0, self._rows_N, out=self._base_RV[here])
        self._num_drafted = here.stop

        tokens_N = self._launcher.draft(self._base_RV, self._prepared, self._drafts_RC, here)
        if bonus is not None:
            numbers = [here.start + n for n in bonus.sequences]
            prepared = self._prepared.some(numbers, to_device(numbers, device))
            decided = self._launcher.launch(
                self._base_RV, bonus.logits_MV, prepared, self._drafts_RC
            )
            tokens_N[to_device(bonus.sequences, device)] = decided.tokens_N
        return tokens_N

    def decide(self, teacher: LogitRows) -> Decided:
        assert self._base_RV is not None
        num_positions = self._num_drafted // self._num_sequences
        rows = [row + position for position in range(num_positions) for row in teacher.rows]
        self._prepared.set_teacher_rows(to_device(rows, teacher.logits_RV.device))
        return self._launcher.launch(
            self._base_RV, teacher.logits_RV, self._prepared, self._drafts_RC
        )


def _ways(settings: Sequence[RowSettings]) -> list[tuple[list[int], bool]]:
    """The rows that the kernels handle (True) and the others (False); no part is empty."""
    handled = [handles(s) for s in settings]
    if len(set(handled)) <= 1:
        return [(list(range(len(settings))), all(handled))]
    return [
        ([n for n, by_kernels in enumerate(handled) if by_kernels is way], way)
        for way in (True, False)
    ]

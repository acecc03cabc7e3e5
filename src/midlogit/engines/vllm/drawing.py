"""The draws of one step on vLLM's logits: drafts after each forward of the base, decisions after that of the teacher.

Knows rows of two models and the policy, as arrays or as fused kernels; not which request a row belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from midlogit.sampling.decision import Decision, RowSettings
from midlogit.sampling.policy import decide, draft

if TYPE_CHECKING:
    pass


class Drawing(ABC):
    """The tokens of N sequences at P successive places, of which all but the last are drafted.

    `base` is called P times, then `decide` once; results are asked for afterwards. Decisions are in order of places,
    N at each.
    """

    @abstractmethod
    def base(self, logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
        """Takes the base's logits at the next place, at these rows.

        Returns:
            the drafted tokens [N] on the device, nothing of use at the last place.
        """

    @abstractmethod
    def decide(self, logits_RV: Tensor, rows: Sequence[int]) -> None:
        """Takes the teacher's logits, whose rows for a sequence's places follow each other from these on."""

    @abstractmethod
    def drafted_ids(self) -> list[int]:
        """What was drafted at each place but the last; waits for the device."""

    @abstractmethod
    def token_ids(self) -> list[int]:
        """What was drawn at each place; waits for the device."""

    @abstractmethod
    def decisions(self) -> list[Decision]:
        """All that is known of what was drawn."""


class ArrayDrawing(Drawing):
    """By the policy's own arrays; each draft and the decisions are made at once.

    Args:
        settings: of all places, N at each. sequences: N.
    """

    def __init__(self, settings: Sequence[RowSettings], sequences: int, vocabulary: int) -> None:
        self._settings, self._sequences, self._vocabulary = settings, sequences, vocabulary
        self._base_rows: list[Tensor] = []
        self._drafted: list[int] = []
        self._made: list[Decision] = []

    def base(self, logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
        rows_NV = self._taken(logits_RV, rows)
        start = len(self._base_rows) * self._sequences
        self._base_rows.append(rows_NV)
        if start + self._sequences == len(self._settings):
            return torch.empty(0)
        tokens = draft(rows_NV, self._settings[start : start + self._sequences])
        self._drafted += tokens
        return torch.tensor(tokens, device=logits_RV.device)

    def decide(self, logits_RV: Tensor, rows: Sequence[int]) -> None:
        places = range(len(self._base_rows))
        teacher_NV = self._taken(logits_RV, [row + place for place in places for row in rows])
        self._made = decide(torch.cat(self._base_rows), teacher_NV, self._settings)

    def _taken(self, logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
        index_N = torch.tensor(rows, device=logits_RV.device)
        return logits_RV[index_N, : self._vocabulary].to(torch.promote_types(logits_RV.dtype, torch.float32))

    def drafted_ids(self) -> list[int]:
        return self._drafted

    def token_ids(self) -> list[int]:
        return [decision.token_id for decision in self._made]

    def decisions(self) -> list[Decision]:
        return self._made

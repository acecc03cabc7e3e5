"""The draws of one step on vLLM's logits: drafts after each forward of the base, decisions after that of the teacher.

Knows rows of two models and the policy, as arrays and as fused kernels; not which request a row belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from midlogit.sampling.decision import Decision, RowSettings
from midlogit.sampling.policy import decide, draft

if TYPE_CHECKING:
    from midlogit.fused.decide import FusedPolicy, Pending, Prepared

T = TypeVar("T")


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
    def tokens(self) -> Tensor:
        """What was drawn at each place, on the device, for work enqueued later."""

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
        self._device: torch.device

    def base(self, logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
        rows_NV = self._taken(logits_RV, rows)
        start = len(self._base_rows) * self._sequences
        self._base_rows.append(rows_NV)
        if start + self._sequences == len(self._settings):
            return torch.empty(0)
        tokens = draft(rows_NV, self._settings[start : start + self._sequences])
        self._drafted += tokens
        return _sent(tokens, logits_RV.device)

    def decide(self, logits_RV: Tensor, rows: Sequence[int]) -> None:
        places = range(len(self._base_rows))
        teacher_NV = self._taken(logits_RV, [row + place for place in places for row in rows])
        self._made = decide(torch.cat(self._base_rows), teacher_NV, self._settings)
        self._device = logits_RV.device

    def tokens(self) -> Tensor:
        return _sent(self.token_ids(), self._device)

    def _taken(self, logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
        return logits_RV[_sent(rows, logits_RV.device), : self._vocabulary].to(
            torch.promote_types(logits_RV.dtype, torch.float32)
        )

    def drafted_ids(self) -> list[int]:
        return self._drafted

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
        self._places = len(settings) // sequences
        self._place = 0
        self._base_rows: Sequence[int] = ()
        self._base_NV: Tensor
        self._prepared: Prepared
        self._drafts_NC: Tensor | None = None
        self._pending: Pending

    def base(self, logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
        if self._places == 1:  # the kernels read the rows where they are
            self._base_NV, self._base_rows = logits_RV, rows
            return torch.empty(0)
        if self._place == 0:
            self._base_NV = logits_RV.new_empty((len(self._settings), logits_RV.shape[1]))
            self._drafts_NC = self._policy.drafts(len(self._settings))
            self._prepared = self._policy.prepare(self._settings)
        some = slice(self._place * self._sequences, (self._place + 1) * self._sequences)
        torch.index_select(logits_RV, 0, _sent(rows, logits_RV.device), out=self._base_NV[some])
        self._place += 1
        assert self._drafts_NC is not None
        return self._policy.draft(self._base_NV, self._prepared, self._drafts_NC, some)

    def decide(self, logits_RV: Tensor, rows: Sequence[int]) -> None:
        teacher_rows = [row + place for place in range(self._places) for row in rows]
        if self._places == 1:
            self._prepared = self._policy.prepare(self._settings, self._base_rows, teacher_rows)
        else:
            self._prepared.teacher_at(_sent(teacher_rows, logits_RV.device))
        self._pending = self._policy.launch(self._base_NV, logits_RV, self._prepared, self._drafts_NC)

    def tokens(self) -> Tensor:
        return self._pending.tokens_N

    def drafted_ids(self) -> list[int]:
        return self._pending.drafted_ids()[: (self._places - 1) * self._sequences]

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

    def base(self, logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
        tokens_N = torch.empty(len(rows), dtype=torch.int64, device=logits_RV.device)
        for numbers, part in self._parts:
            drafted = part.base(logits_RV, [rows[n] for n in numbers])
            if len(drafted):
                tokens_N[_sent(numbers, logits_RV.device)] = drafted
        return tokens_N

    def decide(self, logits_RV: Tensor, rows: Sequence[int]) -> None:
        for numbers, part in self._parts:
            part.decide(logits_RV, [rows[n] for n in numbers])

    def tokens(self) -> Tensor:
        parts = [part.tokens() for _, part in self._parts]
        starts = accumulate((len(tokens_M) for tokens_M in parts), initial=0)
        order = self._joined([list(range(at, at + len(tokens_M))) for at, tokens_M in zip(starts, parts, strict=False)])
        return torch.cat(parts)[_sent(order, parts[0].device)]

    def drafted_ids(self) -> list[int]:
        return self._joined([part.drafted_ids() for _, part in self._parts])

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


def _sent(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers on the device, sent without waiting for it."""
    there = torch.tensor(numbers, pin_memory=device.type == "cuda")
    return there.to(device, non_blocking=True)

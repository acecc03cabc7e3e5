"""The alphabets of a batch as tables on the device: hidden ids, stop classes; knows Outcomes, not rows.

An alphabet is an Outcomes and whether the sequence may end. Few differ in practice, and they stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from midlogit.core.arrays import Array
from midlogit.core.outcomes import Outcomes

STOPS = 64  # stop ids that a merged class can have
ROWS = 64  # alphabets that the tables hold at first
FORGET = 512  # alphabets after which the tables start anew


@dataclass(frozen=True, slots=True)
class Tables:
    """Alphabets on the device, A of them.

    Attributes:
        hidden_AB: a bit for each id that cannot be drawn by itself, the members of a merged class among them.
        dirty_AT: which tiles hold a hidden id or a stop class.
        stops_AS: the ids of the merged class, −1 where there are no more.
    """

    hidden_AB: torch.Tensor
    dirty_AT: torch.Tensor
    stops_AS: torch.Tensor

    @classmethod
    def empty(cls, alphabets: int, vocabulary: int, tile: int, device: torch.device) -> Tables:
        tiles = -(-vocabulary // tile)
        return cls(
            torch.zeros((alphabets, tiles * tile // 8), dtype=torch.uint8, device=device),
            torch.zeros((alphabets, tiles), dtype=torch.uint8, device=device),
            torch.full((alphabets, STOPS), -1, dtype=torch.int32, device=device),
        )


class Alphabets:
    """Numbers alphabets as they are met and keeps their tables.

    Tables once handed out are not changed where a launch may read them: new alphabets are appended, and larger
    tables are copies.
    """

    def __init__(self, vocabulary: int, tile: int, device: torch.device) -> None:
        self._vocabulary, self._tile, self._device = vocabulary, tile, device
        self._start_anew()

    def _start_anew(self) -> None:
        self.tables = Tables.empty(ROWS, self._vocabulary, self._tile, self._device)
        self._numbers: dict[object, int] = {}
        self._known: dict[tuple[int, bool], tuple[Outcomes, int]] = {}  # holds the Outcomes, so ids stay theirs

    def make_room(self) -> None:
        """Called before a batch, whose numbers all refer to the same tables."""
        if len(self._numbers) > FORGET or len(self._known) > 16 * FORGET:
            self._start_anew()

    def number(self, outcomes: Outcomes, may_end: bool) -> int:
        known = self._known.get((id(outcomes), may_end))
        if known is None:
            content = (outcomes.masked_ids, outcomes.stop_ids, outcomes.merge, outcomes.stop_token_ids, may_end)
            if content not in self._numbers:
                self._add(outcomes, may_end, len(self._numbers))
                self._numbers[content] = len(self._numbers)
            known = self._known[id(outcomes), may_end] = (outcomes, self._numbers[content])
        return known[1]

    def _add(self, outcomes: Outcomes, may_end: bool, number: int) -> None:
        if number == len(self.tables.hidden_AB):
            larger = Tables.empty(2 * number, self._vocabulary, self._tile, self._device)
            larger.hidden_AB[:number] = self.tables.hidden_AB
            larger.dirty_AT[:number] = self.tables.dirty_AT
            larger.stops_AS[:number] = self.tables.stops_AS
            self.tables = larger
        hidden_V = np.zeros(8 * self.tables.hidden_AB.shape[1], dtype=bool)
        hidden = set(outcomes.masked if may_end else outcomes.masked_before_end)
        merged = outcomes.merged and may_end
        if merged:
            hidden |= set(outcomes.stop_ids)
        hidden_V[[i for i in hidden if i < self._vocabulary]] = True
        hidden_V[self._vocabulary :] = True
        stops_S = np.full(STOPS, -1, dtype=np.int32)
        if merged:
            stops_S[: len(outcomes.stop_ids)] = outcomes.stop_ids
        self._send(self.tables.hidden_AB[number], np.packbits(hidden_V, bitorder="little"))
        self._send(self.tables.dirty_AT[number], hidden_V.reshape(-1, self._tile).any(axis=1).astype(np.uint8))
        self._send(self.tables.stops_AS[number], stops_S)

    def _send(self, row: torch.Tensor, values: Array) -> None:
        source = torch.from_numpy(values)
        row.copy_(source.pin_memory() if self._device.type == "cuda" else source, non_blocking=True)

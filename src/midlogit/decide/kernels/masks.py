"""The alphabets of a batch as tables on the device: masks of hidden ids, stop classes; knows Outcomes, not rows.

An alphabet is an Outcomes and whether the sequence may end. Few differ in practice, and they stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from midlogit.core.arrays import Array
from midlogit.core.outcomes import Outcomes
from midlogit.decide.transfer import to_device

STOPS = 64  # stop ids that a merged class can have
ROWS = 64  # alphabets that the tables hold at first
FORGET = 512  # alphabets after which the tables start anew


@dataclass(frozen=True, slots=True)
class AlphabetTables:
    """Alphabets on the device, A of them.

    Attributes:
        hidden_AB: one bit per id, set where it cannot be drawn by itself; members of a merged class are hidden too.
        hidden_tiles_AT: whether a tile has a hidden id or a stop class.
        stops_AS: the ids of the merged class, then −1.
    """

    hidden_AB: torch.Tensor
    hidden_tiles_AT: torch.Tensor
    stops_AS: torch.Tensor

    @classmethod
    def empty(
        cls, alphabets: int, vocabulary: int, tile: int, device: torch.device
    ) -> AlphabetTables:
        tiles = -(-vocabulary // tile)
        return cls(
            torch.zeros((alphabets, tiles * tile // 8), dtype=torch.uint8, device=device),
            torch.zeros((alphabets, tiles), dtype=torch.uint8, device=device),
            torch.full((alphabets, STOPS), -1, dtype=torch.int32, device=device),
        )


class Alphabets:
    """Numbers alphabets in the order of their first use and keeps their tables.

    The rows that a launch may read are never changed: new alphabets are appended, and larger tables are copies.
    """

    def __init__(self, vocabulary: int, tile: int, device: torch.device) -> None:
        self._vocabulary, self._tile, self._device = vocabulary, tile, device
        self._start_anew()

    def _start_anew(self) -> None:
        self.tables = AlphabetTables.empty(ROWS, self._vocabulary, self._tile, self._device)
        self._numbers: dict[object, int] = {}
        self._known: dict[
            tuple[int, bool], tuple[Outcomes, int]
        ] = {}  # holds the Outcomes, so ids stay theirs

    def make_room(self) -> None:
        """Forgets alphabets if there are too many; to be called before a batch, whose numbers share their tables."""
        if len(self._numbers) > FORGET or len(self._known) > 16 * FORGET:
            self._start_anew()

    def number(self, outcomes: Outcomes, may_end: bool) -> int:
        known = self._known.get((id(outcomes), may_end))
        if known is None:
            content = (
                outcomes.masked_ids,
                outcomes.stop_ids,
                outcomes.merge,
                outcomes.stop_token_ids,
                may_end,
            )
            if content not in self._numbers:
                self._add(outcomes, may_end, len(self._numbers))
                self._numbers[content] = len(self._numbers)
            known = self._known[id(outcomes), may_end] = (outcomes, self._numbers[content])
        return known[1]

    def _add(self, outcomes: Outcomes, may_end: bool, number: int) -> None:
        if number == len(self.tables.hidden_AB):
            larger = AlphabetTables.empty(2 * number, self._vocabulary, self._tile, self._device)
            larger.hidden_AB[:number] = self.tables.hidden_AB
            larger.hidden_tiles_AT[:number] = self.tables.hidden_tiles_AT
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

        hidden_tiles_T = hidden_V.reshape(-1, self._tile).any(axis=1).astype(np.uint8)
        self.tables.hidden_AB[number] = self._send(np.packbits(hidden_V, bitorder="little"))
        self.tables.hidden_tiles_AT[number] = self._send(hidden_tiles_T)
        self.tables.stops_AS[number] = self._send(stops_S)

    def _send(self, values: Array) -> torch.Tensor:
        return to_device(torch.from_numpy(values), self._device)

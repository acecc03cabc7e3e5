"""Counter-based uniforms: those of each token position, keyed by (seed, sample); knows no distribution.

Philox (Salmon et al. 2011; docs/theory.md (17)): the values at a position depend on the key alone, so
the same request draws the same tokens whatever else is in its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BLOCK = 64  # positions made at once
LANES = 4  # words of one Philox output


class Chances(NamedTuple):
    """The uniforms in [0, 1) that decide one token.

    Attributes:
        draft: which token the base drafts. accept: whether that stands. redraw: what is drawn where it does not.
    """

    draft: float
    accept: float
    redraw: float


class Uniforms:
    """The uniforms of one sequence, multiples of 2^-53 in [0, 1)."""

    def __init__(self, seed: int, sample: int) -> None:
        self._key = (seed % 2**64) << 64 | sample
        self._block = -1
        self._values: list[list[float]] = []

    def at(self, position: int) -> Chances:
        """The uniforms of a token position."""
        return Chances(*self._lanes(position)[: len(Chances._fields)])

    def seed_at(self, position: int) -> int:
        """A seed below 2^53 for drafts that a server makes from this position on; from the lane that `at` leaves."""
        return int(self._lanes(position)[-1] * 2**53)

    def _lanes(self, position: int) -> list[float]:
        block, offset = divmod(position, BLOCK)
        if block != self._block:
            philox = np.random.Philox(key=self._key, counter=block * BLOCK)
            self._values, self._block = np.random.Generator(philox).random((BLOCK, LANES)).tolist(), block
        return self._values[offset]

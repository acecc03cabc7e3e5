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
        self._values: list[Chances] = []

    def at(self, position: int) -> Chances:
        """The uniforms of a token position."""
        block, offset = divmod(position, BLOCK)
        if block != self._block:
            philox = np.random.Philox(key=self._key, counter=block * BLOCK)
            values = np.random.Generator(philox).random((BLOCK, LANES))[:, : len(Chances._fields)]
            self._values, self._block = [Chances(*row) for row in values.tolist()], block
        return self._values[offset]

"""Counter-based uniforms: one for each decision, keyed by (seed, sample, purpose, position); knows no distribution.

Philox (Salmon et al. 2011; docs/theory.md (17)): the value at a position depends on its key alone, so
the same request draws the same tokens whatever else is in its batch.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

BLOCK = 256


class Purpose(IntEnum):
    """What a uniform decides; each purpose has a stream of its own."""

    DRAW = 0


class Uniforms:
    """The uniforms of one sequence for one purpose, multiples of 2^-53 in [0, 1)."""

    def __init__(self, seed: int, sample: int, purpose: Purpose) -> None:
        self._key = (seed % 2**64) << 64 | (sample << 8) | purpose
        self._block = -1
        self._values: np.ndarray[tuple[int], np.dtype[np.float64]] = np.empty(0)

    def at(self, position: int) -> float:
        """The uniform of a token position."""
        block, offset = divmod(position, BLOCK)
        if block != self._block:
            philox = np.random.Philox(key=self._key, counter=block * BLOCK)
            self._values, self._block = np.random.Generator(philox).random(BLOCK), block
        return float(self._values[offset])

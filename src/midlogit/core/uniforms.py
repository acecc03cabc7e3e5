"""Counter-based uniforms of each token position, keyed by seed, request and sample; knows no distribution.

Philox (Salmon et al. 2011; docs/theory.md (17)): the values at a position depend on the key alone, so
the same request draws the same tokens whatever else is in its batch, and different requests of one seed
draw independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

BLOCK = 64  # positions made at once
LANES = 4  # words of one Philox output
ENDINGS = (
    1 << 128
)  # where the counter of the uniforms for ending ids begins, which no position reaches


class TokenUniforms(NamedTuple):
    """The uniforms in [0, 1) that decide one token.

    Attributes:
        draft: which token the base drafts. accept: whether it is accepted. redraw: what replaces a rejected draft.
        ending: which id of a drawn stop class is emitted, where the base's own conditional decides.
    """

    draft: float
    accept: float
    redraw: float
    ending: float = 0.0


def identity(
    base_ids: Sequence[int], teacher_ids: Sequence[int], request_id: str | None = None
) -> bytes:
    """A digest that distinguishes a request from the others of its call.

    Args:
        base_ids, teacher_ids: the ids of both prompts.
        request_id: a name that the caller gives the request, such as the row of a data set.
    """
    digest = blake2b(digest_size=32)
    for ids in (base_ids, teacher_ids):
        row = np.asarray(ids, dtype="<i8")
        digest.update(row.size.to_bytes(8, "little"))
        digest.update(row.tobytes())
    if request_id is not None:
        digest.update(b"id" + request_id.encode("utf-8", "surrogatepass"))
    return digest.digest()


class Uniforms:
    """The uniforms of one sequence, multiples of 2^-53 in [0, 1).

    Args:
        seed: of the call; two seeds that agree modulo 2^64 are one.
        sample: tells apart the sequences of one request; at least 0, below 2^64.
        identity: tells apart the requests of one seed, as `identity` makes it.
    """

    def __init__(self, seed: int, sample: int, identity: bytes = b"") -> None:
        digest = blake2b((seed % 2**64).to_bytes(8, "little") + identity, digest_size=16).digest()
        self._key = int.from_bytes(digest, "little")
        self._first = sample << 192  # the top word of the counter, which no position reaches
        self._block = -1
        self._values: list[list[float]] = []
        self._endings: list[float] = []

    def at(self, position: int) -> TokenUniforms:
        """The uniforms of a token position."""
        draft, accept, redraw, _ = self._lanes(position)
        return TokenUniforms(draft, accept, redraw, self._endings[position % BLOCK])

    def seed_at(self, position: int) -> int:
        """A seed below 2^53 for a server's drafts from this position on, independent of `at`."""
        return int(self._lanes(position)[-1] * 2**53)

    def _lanes(self, position: int) -> list[float]:
        block, offset = divmod(position, BLOCK)
        if block != self._block:
            first = self._first + block * BLOCK
            self._values = self._generator(first).random((BLOCK, LANES)).tolist()
            self._endings = self._generator(first + ENDINGS).random(BLOCK).tolist()
            self._block = block
        return self._values[offset]

    def _generator(self, counter: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._key, counter=counter))

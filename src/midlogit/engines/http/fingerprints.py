"""Fingerprints of a server's weights: its most likely ids after fixed prompts; asks no server.

A fingerprint tells other weights from the same ones computed again, perhaps in another batch. Changes as small as the
rounding of bfloat16 are not noticed.
"""

from __future__ import annotations

from collections.abc import Sequence

from midlogit.engines.http.rows import most_likely

PROMPTS = ((5, 6, 7), (5, 6))  # arbitrary ids
LISTED = 20  # ids of each prompt, fewer where the server allows fewer
TOLERANCE = 0.15  # nats, of the mean difference; bfloat16 rounds logits by up to 0.06

Fingerprint = list[dict[int, float]]


def fingerprint(rows: Sequence[dict[int, float]]) -> Fingerprint:
    """The fingerprint in the rows of PROMPTS."""
    return [most_likely(row, min(LISTED, len(row))) for row in rows]


def differ(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two fingerprints are of different weights."""
    differences = [
        abs(logprob - theirs.get(i, min(theirs.values())))
        for ours, theirs in zip(one, other, strict=True)
        for i, logprob in ours.items()
    ]
    return sum(differences) > TOLERANCE * len(differences)

"""Whether greedy texts agree, as far as rounding lets them."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from midlogit import Completion

TIE = 1e-3  # difference of the two largest values of q* that rounding may turn around


def require_equal_up_to_ties(found: Sequence[Completion], expected: Sequence[Completion]) -> int:
    """The tokens before the first tie are the same, and the whole text where there is none; how many were compared.

    `expected` holds the two likeliest tokens of each place (`top_logprobs=2`).
    """
    compared = 0
    for one, other in zip(found, expected, strict=True):
        assert one.error is other.error is None
        largest = [exp(top.q[0][1]) - exp(top.q[1][1]) for top in other.top]
        tie = next(
            (place for place, difference in enumerate(largest) if difference <= TIE), len(largest)
        )
        assert one.token_ids[:tie] == other.token_ids[:tie]
        if tie == len(largest):
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        compared += tie
    print(f"{compared} tokens compared")
    return compared

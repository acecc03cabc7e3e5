"""Which pictures a report has, in the order of its page; knows which numbers each needs, draws nothing.

Every picture takes one run or two; two are drawn over each other, each in a colour of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from midlogit.report import completion_charts as of_completions
from midlogit.report import token_charts as of_tokens
from midlogit.report.numbers import Numbers
from midlogit.report.picture import Picture
from midlogit.report.vega import RUNS

Maker = Callable[[Sequence[Numbers], Any], "Picture | None"]
MAKERS: tuple[tuple[str, Maker], ...] = (
    ("alpha", of_tokens.alpha),
    ("alpha", of_tokens.alpha_position),
    ("alpha", of_tokens.alpha_entropy),
    ("kl", of_tokens.kl),
    ("kl", of_tokens.kl_position),
    ("kl", of_completions.kl_largest),
    ("kl", of_tokens.self_test),
    ("ess", of_tokens.ess_token),
    ("ess", of_completions.ess_length),
    ("lengths", of_completions.lengths),
    ("lengths", of_completions.repetition),
    ("exactness", of_tokens.coverage),
    ("exactness", of_tokens.bounds),
)
ALONE: tuple[Maker, ...] = (of_tokens.alpha_entropy, of_tokens.self_test)  # that two cannot share


def pictures(runs: Sequence[Numbers]) -> list[Picture]:
    """The pictures that one run, or two over each other, have numbers for."""
    names = [run["head"]["name"] for run in runs]
    both = len(runs) == 2
    key = (
        tuple((colour, name, False) for colour, name in zip(RUNS, names, strict=False))
        if both
        else ()
    )
    found = [
        make(runs, key)
        for section, make in MAKERS
        if all(run[section] for run in runs) and (not both or make not in ALONE)
    ]
    return [picture for picture in found if picture is not None]

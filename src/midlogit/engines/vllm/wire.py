"""Sequences on their way to the other ranks: what they draw and where they may end, without text or listener."""

from __future__ import annotations

import pickle
from collections.abc import MutableMapping
from dataclasses import replace
from weakref import WeakKeyDictionary, WeakValueDictionary

from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import AlphaRule
from midlogit.engines.vllm.lockstep import Lockstep
from midlogit.errors import InvalidRequest
from midlogit.requests.scoring import Scored, ScoreRequest
from midlogit.requests.sequence import Positions, Request, Sequence

# Rows of one alphabet are decided together, so each must be one object here where it is one on rank 0.
_received: MutableMapping[int, Outcomes] = WeakValueDictionary()


class RunsSent:
    """Packs sequences, and numbers the alphabets that they draw from."""

    def __init__(self) -> None:
        self._numbers: MutableMapping[Outcomes, int] = WeakKeyDictionary()
        self._next = 0

    def pack(self, run: Sequence | Scored) -> tuple[Request | ScoreRequest, int]:
        """The arguments of `add_sent`."""
        if isinstance(run, Scored):
            return run.request, self._number(run.request.outcomes)
        request = replace(run.request, prompt=None, base_prompt=None)
        return request, self._number(request.outcomes)

    def _number(self, outcomes: Outcomes) -> int:
        if outcomes not in self._numbers:
            self._numbers[outcomes] = self._next
            self._next += 1
        return self._numbers[outcomes]


def add_sent(lockstep: Lockstep, key: str, request: Request | ScoreRequest, number: int) -> None:
    """Adds a sequence that was packed by rank 0.

    Args:
        number: of its alphabet.
    """
    outcomes = _received.setdefault(number, request.outcomes)
    if isinstance(request, ScoreRequest):
        text = Scored(replace(request, outcomes=outcomes), lambda scores: None)
        lockstep.scorer.add(key, text)
    else:
        lockstep.add(key, Positions(replace(request, outcomes=outcomes)))


def require_sendable(rule: AlphaRule) -> None:
    """Refuses a rule for α that the other ranks could not load.

    Raises:
        InvalidRequest: its class is in the main module or in a function.
    """
    try:
        pickle.dumps(rule)
        is_there = type(rule).__module__ != "__main__"
    except Exception:  # pickle raises many kinds
        is_there = False
    if not is_there:
        raise InvalidRequest(
            f"The other ranks cannot load {type(rule).__name__}.",
            "Define the rule in a module that can be imported.",
        )

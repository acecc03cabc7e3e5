"""Results of kernels on their way to the host, and the Decisions they become; knows tables, not how they are filled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from midlogit.decide.base import Decided, RowSettings
from midlogit.decide.kernels.layout import ERRORS, RESULT_DRAFT, RESULT_TOKEN_ID
from midlogit.decide.transfer import HostCopy
from midlogit.outputs import Candidates, Decision, Top


@dataclass(frozen=True, slots=True)
class TopTables:
    """The most likely ids of N decisions on the device, in L lists: of base, teacher and q.

    Attributes:
        ids_NLK: most likely first; a decision that asks for fewer than K has its own number of them.
        logprobs_NLK: −inf where no id is left that has mass.
    """

    ids_NLK: Tensor
    logprobs_NLK: Tensor


class TableTop(Top):
    """A row of the lists, which become candidates each time they are read; most never are.

    Args:
        ids_LK, logprobs_LK: as of `TopTables`, as many as were asked for.
    """

    __slots__ = ("_row",)
    _row: tuple[np.ndarray, np.ndarray]

    def __init__(self, ids_LK: np.ndarray, logprobs_LK: np.ndarray) -> None:
        # Copies, since a view would keep the tables of a whole step alive.
        object.__setattr__(self, "_row", (ids_LK.copy(), logprobs_LK.copy()))

    def __reduce__(self) -> Any:
        return Top, (self.q, self.base, self.teacher)

    @property
    def base(self) -> Candidates:
        return self._candidates(0)

    @property
    def teacher(self) -> Candidates:
        return self._candidates(1)

    @property
    def q(self) -> Candidates:
        return self._candidates(2)

    def _candidates(self, number: int) -> Candidates:
        ids_LK, logprobs_LK = self._row
        listed = zip(ids_LK[number].tolist(), logprobs_LK[number].tolist(), strict=True)
        return [(token_id, logprob) for token_id, logprob in listed if logprob > -math.inf]


class KernelDecided(Decided):
    """Results of a launch, which are being copied to the host.

    In a row with an error the token is 0.

    Args:
        top: the lists of the decisions that ask for any; None if none does.
    """

    def __init__(
        self,
        settings: Sequence[RowSettings],
        tokens_N: Tensor,
        results_NC: Tensor,
        top: TopTables | None,
    ) -> None:
        self._settings = settings
        self._tokens_N = tokens_N
        self._results = HostCopy(results_NC)
        self._top = [] if top is None else [HostCopy(top.ids_NLK), HostCopy(top.logprobs_NLK)]

    @property
    def tokens_N(self) -> Tensor:
        return self._tokens_N

    def token_ids(self) -> list[int]:
        return [int(row[RESULT_TOKEN_ID.value]) for row in self._results.values()]

    def drafted_ids(self) -> list[int]:
        """The base's draft for each decision; it was accepted where it is the decided id. Waits for the device."""
        return [int(row[RESULT_DRAFT.value]) for row in self._results.values()]

    def decisions(self) -> list[Decision]:
        results = zip(self._results.values(), self._settings, strict=True)
        decisions = [_decision(row, settings) for row, settings in results]
        if self._top:
            tables = (copy.array() for copy in self._top)
            rows = zip(decisions, self._settings, *tables, strict=True)
            for decision, settings, ids_LK, logprobs_LK in rows:
                count = settings.top_logprobs
                if count and decision.error is None:
                    decision.top = TableTop(ids_LK[:, :count], logprobs_LK[:, :count])
        return decisions


def _decision(row: Sequence[float], settings: RowSettings) -> Decision:
    """One row of the results, whose first columns are those of a Decision, as a Decision."""
    token_id, *numbers, fallback, error, _ = row
    decision = Decision(  # type: ignore[call-arg]
        int(token_id),
        *numbers,  # type: ignore[arg-type]
        settings.forced,
        fallback > 0,
        settings.top_p is not None,
    )
    decision.error = ERRORS[int(error)]
    return decision

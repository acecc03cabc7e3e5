"""State of one text to score: its tokens, their settings, and the scores.

Knows the request's parameters; not which engine gives it logits. Each model reads its own prompt. Both prompts end in
the same given tokens, and each is scored given the tokens before it. Nothing is sampled, so no first token is forced
and min_tokens holds nothing back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from midlogit.core.outcomes import Outcomes
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide.base import RowSettings
from midlogit.outputs import Decision, Scores, Side
from midlogit.params import SamplingParams
from midlogit.requests.sequence import Request, row_settings

NOTHING_DRAWN = TokenUniforms(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One text to score.

    Attributes:
        index: which prompt of the call.
        base_ids, teacher_ids: what each model reads.
        given: how many of their last ids, the same on both sides, are scored; each model has an id before them.
        outcomes: the alphabet.
    """

    index: int
    base_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    given: int
    params: SamplingParams
    outcomes: Outcomes

    @classmethod
    def of(cls, request: Request) -> ScoreRequest:
        """Scores a request's prompts: their common ending, each model after its own prompt."""
        base_ids, teacher_ids = request.base_ids, request.teacher_ids
        given = common_ending(base_ids, teacher_ids)
        return cls(request.index, base_ids, teacher_ids, given, request.params, request.outcomes)


class Scored:
    """The state of one score request; `listener` hears the Scores, once.

    Attributes:
        weights_changed: sides that scored it with weights that a server should not have.
    """

    def __init__(self, request: ScoreRequest, listener: Callable[[Scores], None]) -> None:
        self.request = request
        self.is_finished = False
        self.weights_changed: list[Side] = []
        self._listener = listener

    @property
    def settings(self) -> list[RowSettings]:
        """Sampling settings per given token, in order."""
        request, params = self.request, self.request.params
        first = len(request.teacher_ids) - request.given
        return [
            row_settings(
                params,
                request.outcomes,
                forced=False,
                may_end=True,
                uniforms=NOTHING_DRAWN,
                given=token_id,
            )
            for token_id in request.teacher_ids[first:]
        ]

    def finish(self, decisions: list[Decision]) -> None:
        """Takes the decisions of all given tokens."""
        broken = [k for k, decision in enumerate(decisions) if decision.error is not None]
        if broken:
            first = len(self.request.teacher_ids) - self.request.given
            error = decisions[broken[0]].error
            self.fail(f"Prompt {self.request.index}, position {first + broken[0]}: {error}.")
        else:
            self._end(decisions, None)

    def abort(self) -> None:
        """Ends the request because the engine was closed."""
        self.fail("The engine was closed.")

    def fail(self, message: str) -> None:
        """Ends the request without a result."""
        self._end([], message)

    def _end(self, decisions: list[Decision], error: str | None) -> None:
        self.is_finished = True
        request = self.request
        self._listener(
            Scores.of(
                request.index,
                request.teacher_ids,
                request.base_ids,
                decisions,
                self.weights_changed,
                error,
            )
        )


def common_ending(base_ids: Sequence[int], teacher_ids: Sequence[int]) -> int:
    """The number of last ids that can be scored: the same on both sides, with an id before them on each."""
    most = max(min(len(base_ids), len(teacher_ids)) - 1, 0)
    if base_ids == teacher_ids:
        return most
    return next((k for k in range(most) if base_ids[-1 - k] != teacher_ids[-1 - k]), most)

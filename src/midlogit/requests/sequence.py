"""State of one running request: settings of its tokens; text, stops and length after each token.

Knows the request's parameters, its text and its limits; not which engine gives it logits, nor other sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from midlogit.core.outcomes import Outcomes
from midlogit.core.uniforms import TokenUniforms, Uniforms
from midlogit.decide.base import RowSettings
from midlogit.models.detokenize import Detokenizer, TextStream
from midlogit.outputs import (
    Completion,
    Decision,
    Diagnostics,
    ErrorType,
    FinishReason,
    Side,
    Token,
    Usage,
)
from midlogit.params import SamplingParams
from midlogit.rollout import WeightVersion

SUPPORT = "support"  # the stop reason of a sequence whose supports have as many ids as they may


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to make.

    Attributes:
        index, sample: which prompt of the call, which of its n completions.
        prompt, base_prompt: as the user gave them.
        base_ids, teacher_ids: the prompts' token ids.
        seed: of the call, or fresh for this prompt where the call has none.
        identity: what distinguishes the request from others of the seed (`core.uniforms.identity`).
        repetition: which of the call's completions of this very request, across its repeated prompts.
        max_new_tokens: most tokens that fit both context windows.
        outcomes: the alphabet.
        stream: whether the listener wants each token.
        most_support: ids of its supports together with which it ends, where they are asked for; None for no limit.
        error: why the prompt cannot be honoured; such a request ends at once.
    """

    index: int
    sample: int
    prompt: Any
    base_prompt: Any
    base_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    identity: bytes
    repetition: int
    max_new_tokens: int
    outcomes: Outcomes
    stream: bool
    most_support: int | None = None
    error: str | None = None


class Positions:
    """Settings and limits of a request by position, which need none of its text."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._uniforms = Uniforms(request.seed, request.repetition, request.identity)

    def settings_at(self, position: int) -> RowSettings:
        """Sampling settings of the token at `position`; engines may ask ahead of the last sampled token."""
        request = self.request
        return row_settings(
            request.params,
            request.outcomes,
            forced=request.params.force_first_token and position == 0,
            may_end=position >= request.params.min_tokens,
            uniforms=self._uniforms.at(position),
        )

    def draft_seed(self, position: int) -> int:
        """Seed for a server that drafts the tokens from `position` on."""
        return self._uniforms.seed_at(position)

    def ends_with(self, token_id: int, position: int) -> bool:
        """Whether a token at `position` is the last by its id or by length; stop strings may end the text earlier."""
        return token_id in self.request.outcomes.ending or not self.remaining_tokens(position + 1)

    def remaining_tokens(self, position: int) -> int:
        """The number of tokens that fit from `position` on."""
        return max(min(self.request.params.max_tokens, self.request.max_new_tokens) - position, 0)


class Sequence(Positions):
    """The state of one request: tokens, text, diagnostics, and how it ended.

    `listener` hears every Token (if the request streams) and, once, the Completion, each with the sequence.

    Attributes:
        submitted, token_times: when it came in and when each token was drawn, on the monotonic clock.
        weight_versions: which weights of the base drew the tokens so far.
        weights_changed: sides that drew some of them from weights that a server should not have.
    """

    def __init__(self, request: Request, detokenizer: Detokenizer, listener: Listener) -> None:
        super().__init__(request)
        self.token_ids: list[int] = []
        self.decisions: list[Decision] = []
        self.completion: Completion | None = None
        self.submitted = time.monotonic()
        self.token_times: list[float] = []
        self.weight_versions: list[WeightVersion] = []
        self.weights_changed: list[Side] = []
        self._detokenizer = detokenizer
        self._listener = listener
        self._support_size = 0
        live = request.stream or bool(request.params.stop)
        self._text = TextStream(detokenizer, request.teacher_ids, request.params.stop, live=live)

    @property
    def is_finished(self) -> bool:
        return self.completion is not None

    @property
    def next_settings(self) -> RowSettings:
        """Sampling settings of the next token."""
        return self.settings_at(len(self.token_ids))

    def append(self, decision: Decision, weight_version: int | str | None = None) -> None:
        """Takes the sampled token; ends the sequence if it stops here.

        Args:
            weight_version: of the base whose row drew it; None while no version was ever set.
        """
        if decision.error is not None:
            where = f"Request {self.request.index}, position {len(self.token_ids)}"
            self.fail(f"{where}: {decision.error}.", "request")
            return

        self.token_ids.append(decision.token_id)
        self.decisions.append(decision)
        self.token_times.append(time.monotonic())
        if weight_version is not None:
            self._note_version(weight_version)

        released, reason, stop_reason = self._advance_text(decision.token_id)
        if self._fills_support(decision) and reason is None:
            reason, stop_reason = "length", SUPPORT
            released += self._text.finish()
        if self.request.stream:
            self._listener(self, self._token(decision, released, reason, weight_version))
        if reason is not None:
            self._end(reason, stop_reason)

    def _fills_support(self, decision: Decision) -> bool:
        """Counts the ids of a token's support; returns whether there may be no more."""
        self._support_size += len(decision.support or ())
        most = self.request.most_support
        return most is not None and self._support_size >= most

    def _note_version(self, version: int | str) -> None:
        """Counts the last token for the weights that drew it."""
        end = len(self.token_ids)
        if self.weight_versions and self.weight_versions[-1].version == version:
            self.weight_versions[-1] = self.weight_versions[-1]._replace(end=end)
        else:
            self.weight_versions.append(WeightVersion(version, end - 1, end))

    def _advance_text(self, token_id: int) -> tuple[str, FinishReason | None, int | str | None]:
        """Adds a token to the text.

        Returns:
            (text that is certain now, reason to finish, what stopped it): the last two None to go on.
        """
        outcomes, text = self.request.outcomes, self._text
        if token_id in outcomes.ending:
            return text.finish(), "stop", token_id if token_id in outcomes.stop_token_ids else None

        may_stop = len(self.token_ids) > self.request.params.min_tokens
        released = text.push(token_id, may_stop)
        if text.stop_reason is not None:
            return released + text.finish(), "stop", text.stop_reason

        if not self.remaining_tokens(len(self.token_ids)):
            released += text.finish()
            return (
                (released, "length", None)
                if text.stop_reason is None
                else (released, "stop", text.stop_reason)
            )
        return released, None, None

    def abort(self) -> None:
        """Ends the sequence because nobody wants more of it."""
        self._end("abort")

    def fail(self, message: str, error_type: ErrorType = "engine") -> None:
        """Ends the sequence with an error and what it had."""
        self._end("error", error=message, error_type=error_type)

    def _end(
        self,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error: str | None = None,
        error_type: ErrorType | None = None,
    ) -> None:
        """Makes the completion and delivers it; text held back for a stop string is kept."""
        request = self.request
        self._text.finish()
        prompt_tokens, completion_tokens = len(request.teacher_ids), len(self.token_ids)

        self.completion = Completion(
            index=request.index,
            sample=request.sample,
            prompt=request.prompt,
            base_prompt=request.base_prompt,
            prompt_token_ids=list(request.teacher_ids),
            base_prompt_token_ids=list(request.base_ids),
            text=self._text.text,
            token_ids=self.token_ids,
            finish_reason=reason,
            stop_reason=stop_reason,
            usage=Usage(
                prompt_tokens,
                len(request.base_ids),
                completion_tokens,
                prompt_tokens + completion_tokens,
            ),
            diagnostics=Diagnostics.of(self.decisions),
            top=[d.top for d in self.decisions if d.top] if request.params.top_logprobs else None,
            support=self._support(),
            error=error,
            error_type=error_type,
            weight_versions=self.weight_versions,
            weights_changed=self.weights_changed,
        )
        self._listener(self, self.completion)

    def _support(self) -> list[list[int]] | None:
        if not self.request.params.return_support:
            return None
        return [d.support for d in self.decisions if d.support is not None]

    def _token(
        self,
        decision: Decision,
        text: str,
        reason: FinishReason | None,
        weight_version: int | str | None,
    ) -> Token:
        return Token(
            index=self.request.index,
            sample=self.request.sample,
            position=len(self.token_ids) - 1,
            token_id=decision.token_id,
            text=text,
            token=self._detokenizer.token(decision.token_id),
            decision=decision,
            finish_reason=reason,
            weight_version=weight_version,
        )


Listener = Callable[[Sequence, Token | Completion], None]


def row_settings(
    params: SamplingParams,
    outcomes: Outcomes,
    *,
    forced: bool,
    may_end: bool,
    uniforms: TokenUniforms,
    given: int | None = None,
) -> RowSettings:
    """Sampling settings of one token of a request.

    Args:
        forced, may_end, uniforms, given: as of `RowSettings`.
    """
    return RowSettings(  # by position, which takes half the time
        params.alpha_rule,
        outcomes,
        params.temperature,
        params.target_top_p if params.constraint_to_target else None,
        params.alpha_tol,
        forced,
        may_end,
        uniforms,
        params.top_logprobs,
        given,
        return_support=params.return_support,
    )

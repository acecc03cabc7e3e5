"""One completion while it is written: what its next token may be, and what each drawn token makes of it.

Knows the request's parameters, its text and its limits; not which engine gives it logits, nor the
other sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from midlogit.core.outcomes import Outcomes
from midlogit.core.uniforms import Uniforms
from midlogit.decide.base import RowSettings
from midlogit.models.detokenize import Detokenizer, TextStream
from midlogit.outputs import Completion, Decision, Diagnostics, FinishReason, Token, Usage
from midlogit.params import SamplingParams

Listener = Callable[[Token | Completion], None]


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
    error: str | None = None


class Sequence:
    """The state of one request: tokens, text, diagnostics, and how it ended.

    `listener` hears every Token (if the request streams) and, once, the Completion.

    Attributes:
        submitted, token_times: when it came in and when each token was drawn, on the monotonic clock.
    """

    def __init__(self, request: Request, detokenizer: Detokenizer, listener: Listener) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.decisions: list[Decision] = []
        self.completion: Completion | None = None
        self.submitted = time.monotonic()
        self.token_times: list[float] = []
        self._detokenizer = detokenizer
        self._listener = listener
        self._uniforms = Uniforms(request.seed, request.repetition, request.identity)
        live = request.stream or bool(request.params.stop)
        self._text = TextStream(detokenizer, request.teacher_ids, request.params.stop, live=live)

    @property
    def is_finished(self) -> bool:
        return self.completion is not None

    @property
    def next_settings(self) -> RowSettings:
        """What the next token is drawn with."""
        return self.settings_at(len(self.token_ids))

    def settings_at(self, position: int) -> RowSettings:
        """What the token at a position is drawn with; for engines that draw before they have told of the last."""
        params = self.request.params
        return RowSettings(
            rule=params.alpha_rule,
            outcomes=self.request.outcomes,
            temperature=params.temperature,
            top_p=params.target_top_p if params.constraint_to_target else None,
            alpha_tol=params.alpha_tol,
            forced=params.force_first_token and position == 0,
            may_end=position >= params.min_tokens,
            uniforms=self._uniforms.at(position),
            top_logprobs=params.top_logprobs,
        )

    def draft_seed(self, position: int) -> int:
        """For a server that drafts the tokens from this position on."""
        return self._uniforms.seed_at(position)

    def ends_with(self, token_id: int, position: int) -> bool:
        """Whether this token, there, is the last in any case; the text may make it the last of other cases."""
        return token_id in self.request.outcomes.ending_ids or not self.remaining_tokens(position + 1)

    def remaining_tokens(self, position: int) -> int:
        """How many tokens fit from this position on."""
        return max(min(self.request.params.max_tokens, self.request.max_new_tokens) - position, 0)

    def append(self, decision: Decision) -> None:
        """Takes the drawn token; ends the sequence if it stops here."""
        if decision.error is not None:
            self.end(
                "error",
                error=f"Request {self.request.index}, position {len(self.token_ids)}: {decision.error}.",
            )
            return
        params, outcomes, token_id = self.request.params, self.request.outcomes, decision.token_id
        self.token_ids.append(token_id)
        self.decisions.append(decision)
        self.token_times.append(time.monotonic())
        reason: FinishReason | None = None
        stop_reason: int | str | None = None
        ended_by_id = token_id in outcomes.ending_ids
        may_stop = len(self.token_ids) > params.min_tokens
        released = "" if ended_by_id else self._text.push(token_id, may_stop)
        if ended_by_id:
            reason, stop_reason = "stop", token_id if token_id in outcomes.stop_token_ids else None
        elif self._text.stop_reason is not None:
            reason, stop_reason = "stop", self._text.stop_reason
        elif not self.remaining_tokens(len(self.token_ids)):
            reason = "length"
        if reason is not None:
            released += self._text.finish()
            if reason == "length" and self._text.stop_reason is not None:
                reason, stop_reason = "stop", self._text.stop_reason
        if self.request.stream:
            self._listener(self._token(decision, released, reason))
        if reason is not None:
            self.end(reason, stop_reason)

    def end(self, reason: FinishReason, stop_reason: int | str | None = None, error: str | None = None) -> None:
        """Ends the sequence with what it has; text held back for a stop string is kept."""
        request = self.request
        self._text.finish()
        prompt_tokens, completion_tokens = len(request.teacher_ids), len(self.token_ids)
        self.completion = Completion(
            index=request.index,
            sample=request.sample,
            prompt=request.prompt,
            base_prompt=request.base_prompt,
            text=self._text.text,
            token_ids=self.token_ids,
            finish_reason=reason,
            stop_reason=stop_reason,
            usage=Usage(prompt_tokens, len(request.base_ids), completion_tokens, prompt_tokens + completion_tokens),
            diagnostics=Diagnostics.of(self.decisions),
            top=[d.top for d in self.decisions if d.top] if request.params.top_logprobs else None,
            error=error,
        )
        self._listener(self.completion)

    def _token(self, decision: Decision, text: str, reason: FinishReason | None) -> Token:
        return Token(
            index=self.request.index,
            sample=self.request.sample,
            position=len(self.token_ids) - 1,
            token_id=decision.token_id,
            text=text,
            token=self._detokenizer.token(decision.token_id),
            decision=decision,
            finish_reason=reason,
        )

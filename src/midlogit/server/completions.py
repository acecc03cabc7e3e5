"""POST /v1/completions: the legacy endpoint, with echo and scoring; knows its body and its answer."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from midlogit.outputs import Completion, Scores, Token
from midlogit.prompts import Prompt
from midlogit.sampling.sequence import Request
from midlogit.server.body import read_body
from midlogit.server.call import Call
from midlogit.server.errors import ApiError
from midlogit.server.parameters import sampling_params
from midlogit.server.pieces import (
    completion_logprobs,
    facts_of_completion,
    facts_of_scores,
    facts_of_token,
    joined,
    tops_of,
)
from midlogit.server.service import Service
from midlogit.server.vocabulary import Offsets
from midlogit.server.wire.requests import CompletionBody
from midlogit.server.wire.responses import CompletionLogprobs


async def completions(http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, CompletionBody, service.settings.max_body_bytes)
    service.require_model(body.model)
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "invalid_request", "max_tokens 0 asks for nothing without echo.", param="max_tokens")
    call = await service.read(lambda: CompletionCall(service, body))
    return await call.respond(http)


class CompletionCall(Call):
    """A call of the legacy endpoint."""

    def __init__(self, service: Service, body: CompletionBody) -> None:
        super().__init__(
            service,
            body,
            _as_list(body.prompt),
            sampling_params(
                body, service.settings.preset, max_tokens=max(body.max_tokens, 1), top_logprobs=body.logprobs or 0
            ),
            prefix="cmpl",
            chat=False,
            generates=body.max_tokens > 0,
            scores=body.echo and body.logprobs is not None,
        )
        self._body = body
        self._offsets: dict[int, Offsets] = {}

    def frame(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        return {"object": "text_completion", "choices": choices}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The prompt, where it is to be echoed or its ids are to be returned."""
        body, prompt = self._body, self.prompt_of(index)
        if not (body.echo or body.return_token_ids):
            return None
        choice = _empty(index, None if self.requests else "length")
        if body.echo:
            choice["text"] = self._text_of(prompt)
        if self.scores:
            scores = self.scores[prompt.index]
            choice["logprobs"] = self._prompt_logprobs(scores)
            if body.midlogit.diagnostics:
                choice["midlogit"] = facts_of_scores(scores)
        if body.return_token_ids:
            choice |= {"prompt_token_ids": list(prompt.teacher_ids), "token_ids": []}
        return choice

    def delta(self, token: Token, index: int) -> dict[str, Any] | None:
        body = self._body
        choice = _empty(index, None)
        choice["text"] = token.text
        if body.logprobs is not None:
            choice["logprobs"] = completion_logprobs(
                [token.token_id],
                [token.decision.logprob],
                [token.decision.top],
                self._offsets_of(index),
                self.service.vocabulary,
                body.return_tokens_as_token_ids,
            )
        if body.return_token_ids:
            choice["token_ids"] = [token.token_id]
        if body.midlogit.diagnostics:
            choice["midlogit"] = facts_of_token(token, self.service.vocabulary)
        return choice if token.text or len(choice) > len(EMPTY) or choice["logprobs"] else None

    def ending(self, completion: Completion, index: int, rest: str) -> dict[str, Any]:
        return _empty(index, completion.finish_reason) | {"text": rest, "stop_reason": completion.stop_reason}

    def choice(self, completion: Completion, index: int) -> dict[str, Any]:
        body = self._body
        choice = self.opening(index) or _empty(index, None)
        choice["text"] += completion.text
        choice |= {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
        if body.logprobs is not None:
            generated = completion_logprobs(
                completion.token_ids,
                completion.diagnostics.logprobs,
                tops_of(completion.top, len(completion.token_ids)),
                self._offsets_of(index),
                self.service.vocabulary,
                body.return_tokens_as_token_ids,
            )
            choice["logprobs"] = joined(choice["logprobs"], generated) if choice["logprobs"] else generated
        if body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        if body.midlogit.diagnostics:
            facts = facts_of_completion(completion, self.service.vocabulary)
            choice["midlogit"] = choice.get("midlogit", {}) | facts
            if body.return_token_ids:
                choice["midlogit"]["base_prompt_token_ids"] = list(self.prompt_of(index).base_ids)
        return choice

    def _text_of(self, prompt: Request) -> str:
        given = prompt.prompt
        return given if isinstance(given, str) else self.service.vocabulary.decode(prompt.teacher_ids)

    def _offsets_of(self, index: int) -> Offsets:
        if index not in self._offsets:
            prompt = self.prompt_of(index)
            start = len(self._text_of(prompt)) if self._body.echo else 0
            self._offsets[index] = self.service.vocabulary.offsets(prompt.teacher_ids, start, special=False)
        return self._offsets[index]

    def _prompt_logprobs(self, scores: Scores) -> CompletionLogprobs:
        context: list[None] = [None] * scores.first
        return completion_logprobs(
            scores.token_ids,
            [*context, *scores.diagnostics.logprobs],
            [*context, *tops_of(scores.top, len(scores.token_ids) - scores.first)],
            self.service.vocabulary.offsets((), 0, special=True),
            self.service.vocabulary,
            self._body.return_tokens_as_token_ids,
        )


EMPTY = ("index", "text", "logprobs", "finish_reason", "stop_reason")


def _empty(index: int, finish_reason: str | None) -> dict[str, Any]:
    return dict.fromkeys(EMPTY) | {"index": index, "text": "", "finish_reason": finish_reason}


def _as_list(prompt: Any) -> list[Prompt]:
    """The prompts of a body: one, or a list of them."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

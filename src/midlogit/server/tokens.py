"""POST /inference/v1/generate: token ids in, token ids out, for trainers; knows its body and its answer.

Both are those of vLLM's servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from midlogit.outputs import Completion, Token, Top
from midlogit.requests.prompts import Reading
from midlogit.server.alone import Side, alone, require_no_mixture
from midlogit.server.body import read_body
from midlogit.server.call import Call, add_versions, respond
from midlogit.server.logs import request_id
from midlogit.server.parameters import sampling_params, template_kwargs
from midlogit.server.pieces import candidates_of, finite, tops_of
from midlogit.server.prompt_logprobs import Position, prompt_logprobs
from midlogit.server.service import MODEL, Service
from midlogit.server.vocabulary import by_id
from midlogit.server.wire.tokens import TokensBody


async def generate(http: HttpRequest, side: Side | None = None) -> Response:
    """Ids of q*, or of one side alone."""
    service: Service = http.app.state.service
    body = await read_body(http, TokensBody, service.settings.max_body_bytes)
    service.require_model(body.model, side)
    sampling = body.sampling_params
    sampling._size = body.size
    if side is not None:
        require_no_mixture(sampling, side)
    return await respond(http, service, sampling, partial(TokenCall, service, body, side))


class TokenCall(Call):
    """A call of one prompt, to q* or to one side alone. Where a nucleus is held, choices have its ids.

    Without max_tokens a completion may fill the context.
    """

    def __init__(self, service: Service, body: TokensBody, side: Side | None) -> None:
        given = body.sampling_params
        params = sampling_params(
            given,
            service.settings,
            max_tokens=given.max_tokens or service.max_model_len,
            top_logprobs=given.logprobs or 0,
        )
        variables = template_kwargs(
            None, given.midlogit, service.settings.chat_template_kwargs, chat=False
        )
        params = alone(params, side) if side else params
        super().__init__(
            service,
            given,
            [body.token_ids],
            replace(params, return_support=params.constraint_to_target),
            prefix="generate-tokens",
            reading=Reading(chat_template_kwargs=variables),
            scores=given.prompt_logprobs,
            model=side or MODEL,
        )
        self._body, self._side = given, side
        self._prompt_logprobs: list[Position | None] = []

    def frame(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        frame: dict[str, Any] = {"request_id": request_id.get(), "choices": choices}
        if chunk:
            return frame
        if self._body.return_token_ids:
            frame["prompt_token_ids"] = self.prompt_ids(self.prompts[0])
        if self.scores:
            frame["prompt_logprobs"] = self._prompt_logprobs
        return frame

    def opening(self, index: int) -> None:
        return None

    def delta(self, token: Token, index: int) -> dict[str, Any]:
        logprobs = self._logprobs([token.token_id], [token.decision.logprob], [token.decision.top])
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": None}
        if token.decision.support is not None:
            choice["sampling_mask"] = [token.decision.support]
        self._add_token_data(choice, token)
        return choice | {"token_ids": [token.token_id]}

    def ending(self, completion: Completion, index: int, rest: str) -> dict[str, Any]:
        choice = _choice(completion, index, [])
        add_versions(choice, completion)
        return choice

    def choice(self, completion: Completion, index: int) -> dict[str, Any]:
        ids = completion.token_ids
        choice = _choice(completion, index, ids)
        choice["logprobs"] = self._logprobs(
            ids, completion.diagnostics.logprobs, tops_of(completion.top, len(ids))
        )
        if completion.support is not None:
            choice["sampling_mask"] = completion.support
        self._add_completion_data(choice, completion, index)
        if self.scores and index == 0:
            prompt_ids = self.prompt_ids(self.prompts[0])
            self._prompt_logprobs = prompt_logprobs(
                prompt_ids, self.scores[0], self.service.vocabulary, self._side
            )
        return choice

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[Top | None]
    ) -> dict[str, Any] | None:
        """log q of each token and of its candidates, where they are asked for."""
        if self._body.logprobs is None:
            return None
        content = [
            {
                **_entry(token_id, logprob),
                "top_logprobs": [_entry(*one) for one in candidates_of(token_id, logprob, top)],
            }
            for token_id, logprob, top in zip(token_ids, logprobs, tops, strict=True)
        ]
        return {"content": content}


def _choice(completion: Completion, index: int, token_ids: list[int]) -> dict[str, Any]:
    return {
        "index": index,
        "token_ids": token_ids,
        "logprobs": None,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _entry(token_id: int, logprob: float) -> dict[str, Any]:
    """A token under the names of newer vLLM servers, and of those before them."""
    return {"token_id": token_id, "token": by_id(token_id), "logprob": finite(logprob)}

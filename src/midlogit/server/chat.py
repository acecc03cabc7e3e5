"""POST /v1/chat/completions: messages, in each side's own template; knows its body and its answer."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from midlogit.outputs import Completion, Token
from midlogit.requests.prompts import Reading
from midlogit.server.body import read_body
from midlogit.server.call import Call, add_versions, respond
from midlogit.server.parameters import sampling_params, template_kwargs
from midlogit.server.pieces import chat_logprobs, tops_of
from midlogit.server.service import Service
from midlogit.server.wire.requests import ChatBody


async def chat_completions(http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, ChatBody, service.settings.max_body_bytes)
    service.require_model(body.model)
    return await respond(http, service, body, partial(ChatCall, service, body))


class ChatCall(Call):
    """A call of the chat endpoint. Without max_tokens a completion may fill the context."""

    def __init__(self, service: Service, body: ChatBody) -> None:
        most = body.max_completion_tokens or body.max_tokens or service.max_model_len
        defaults = service.settings.chat_template_kwargs
        variables = template_kwargs(body.chat_template_kwargs, body.midlogit, defaults, chat=True)
        super().__init__(
            service,
            body,
            [[message.plain for message in body.messages]],
            sampling_params(
                body, service.settings, max_tokens=most, top_logprobs=body.top_logprobs
            ),
            prefix="chatcmpl",
            reading=Reading(chat=True, chat_template_kwargs=variables),
        )
        self._body = body

    def frame(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        frame: dict[str, Any] = {
            "object": "chat.completion.chunk" if chunk else "chat.completion",
            "choices": choices,
        }
        if self._body.return_token_ids and not chunk:
            frame["prompt_token_ids"] = self.prompt_ids(self.prompts[0])
        return frame

    def opening(self, index: int) -> dict[str, Any] | None:
        choice = _chunk(index, {"role": "assistant", "content": ""}, None)
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = self.prompt_ids(self.prompts[0])
        return choice

    def delta(self, token: Token, index: int) -> dict[str, Any] | None:
        body = self._body
        choice = _chunk(index, {"content": token.text}, None)

        if body.logprobs:
            choice["logprobs"] = chat_logprobs(
                [token.token_id],
                [token.decision.logprob],
                [token.decision.top],
                self.service.vocabulary,
                body.return_tokens_as_token_ids,
            )

        self._add_token_data(choice, token)
        return choice if token.text or len(choice) > len(CHUNK) or choice["logprobs"] else None

    def ending(self, completion: Completion, index: int, rest: str) -> dict[str, Any]:
        delta = {"content": rest} if rest else {}
        choice = _chunk(index, delta, completion.finish_reason)
        choice["stop_reason"] = completion.stop_reason
        add_versions(choice, completion)
        return choice

    def choice(self, completion: Completion, index: int) -> dict[str, Any]:
        body = self._body
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

        if body.logprobs:
            choice["logprobs"] = chat_logprobs(
                completion.token_ids,
                completion.diagnostics.logprobs,
                tops_of(completion.top, len(completion.token_ids)),
                self.service.vocabulary,
                body.return_tokens_as_token_ids,
            )

        self._add_completion_data(choice, completion, index)
        return choice


CHUNK = ("index", "delta", "logprobs", "finish_reason", "stop_reason")


def _chunk(index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    return dict.fromkeys(CHUNK) | {"index": index, "delta": delta, "finish_reason": finish_reason}

"""Routes about the model: its card, tokenizer, version, health and metrics; runs no request."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from midlogit import __version__
from midlogit.errors import InvalidRequest, PromptTooLong
from midlogit.server.alone import Side
from midlogit.server.body import read_body
from midlogit.server.service import Service, display_name
from midlogit.server.streaming import while_connected
from midlogit.server.wire.requests import DetokenizeBody, TokenizeBody
from midlogit.server.wire.responses import ModelCard, Tokenized, TokenizerInfo

MOST_TOKENS = (
    2**17
)  # of a text that is tokenized or of ids that become text; more where the context is longer


def as_json(data: Any) -> Response:
    return Response(orjson.dumps(data), media_type="application/json")


async def models(http: Request, side: Side | None = None) -> Response:
    """The model served: q*, or one side alone."""
    service: Service = http.app.state.service
    cards = [_card(service, name) for name in service.models(side)]
    return as_json({"object": "list", "data": cards})


async def model(http: Request) -> Response:
    service: Service = http.app.state.service
    service.require_model(http.path_params["name"])
    return as_json(_card(service, http.path_params["name"]))


def _card(service: Service, name: str) -> ModelCard:
    mixing = service.pair.mixing
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "midlogit",
        "max_model_len": service.max_model_len,
        "base": display_name(mixing.base.name),
        "teacher": display_name(mixing.teacher.name),
        "stop_token_ids": list(mixing.stop_ids),
    }


async def tokenize(http: Request) -> Response:
    """Ids of text, or of chat messages in the chat template, by the teacher's tokenizer."""
    service: Service = http.app.state.service
    body = await read_body(http, TokenizeBody, service.settings.max_body_bytes)
    service.require_model(body.model)
    teacher = service.pair.mixing.teacher
    most = max(MOST_TOKENS, service.max_model_len)

    def read() -> list[int]:
        if body.messages is not None:
            variables = {
                **service.settings.chat_template_kwargs[1],
                **(body.chat_template_kwargs or {}),
            }
            messages = [message.plain for message in body.messages]
            return teacher.encode_chat(messages, variables, most=most)
        return teacher.encode(
            body.prompt or "", add_special_tokens=body.add_special_tokens is not False, most=most
        )

    def answer() -> Response:
        try:
            ids = read()
        except PromptTooLong as error:
            raise PromptTooLong(
                f"The text {error.args[0]}; it may have {most}.", "Split it."
            ) from None
        if len(ids) > most:
            raise PromptTooLong(f"The text has {len(ids)} tokens; it may have {most}.", "Split it.")
        found: Tokenized = {
            "count": len(ids),
            "max_model_len": service.max_model_len,
            "tokens": ids,
        }
        if body.return_token_strs:
            found["token_strs"] = [service.vocabulary.text(i) for i in ids]
        return as_json(found)

    return await while_connected(http.receive, service.lanes.read(answer, body.size))


async def detokenize(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, DetokenizeBody, service.settings.max_body_bytes)
    service.require_model(body.model)
    most = max(MOST_TOKENS, service.max_model_len)
    if len(body.tokens) > most:
        raise InvalidRequest(f"tokens holds {len(body.tokens)} ids.", f"It may hold {most}.")
    size = service.pair.mixing.teacher.logit_size
    if body.tokens and max(body.tokens) >= size:
        raise InvalidRequest(f"tokens holds {max(body.tokens)}.", f"Ids run from 0 to {size - 1}.")

    def answer() -> Response:
        return as_json({"prompt": service.vocabulary.decode(body.tokens)})

    return await while_connected(http.receive, service.lanes.read(answer, body.size))


async def tokenizer_info(http: Request) -> Response:
    """The teacher's special tokens and chat template, for clients that tokenize through this server."""
    service: Service = http.app.state.service
    _ = service.pair
    files, tokenizer = service.files, service.files.tokenizer
    info: TokenizerInfo = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "chat_template": files.chat_template if files.has_default_template else None,
    }
    return as_json(info)


async def version(http: Request) -> Response:
    return as_json({"version": __version__})


async def health(http: Request) -> Response:
    """200 with an empty body when requests can be served, else 503 with the reason."""
    service: Service = http.app.state.service
    _ = service.pair
    return Response()


async def metrics(http: Request) -> Response:
    service: Service = http.app.state.service
    return Response(service.metrics.exposition(), media_type=service.metrics.content_type)

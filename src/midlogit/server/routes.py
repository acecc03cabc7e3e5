"""Routes about the model: its card, tokenizer, version, health and metrics; runs no request."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from midlogit import __version__
from midlogit.errors import InvalidRequest
from midlogit.server.alone import Side
from midlogit.server.body import read_body
from midlogit.server.service import MODEL, Service, display_name
from midlogit.server.wire.requests import DetokenizeBody, TokenizeBody
from midlogit.server.wire.responses import ModelCard, Tokenized, TokenizerInfo


def as_json(data: Any) -> Response:
    return Response(orjson.dumps(data), media_type="application/json")


async def models(http: Request, side: Side | None = None) -> Response:
    """The model served: q*, or one side alone."""
    return as_json({"object": "list", "data": [_card(http.app.state.service, side)]})


async def model(http: Request) -> Response:
    service: Service = http.app.state.service
    service.require_model(http.path_params["name"])
    return as_json(_card(service))


def _card(service: Service, side: Side | None = None) -> ModelCard:
    mixing = service.pair.mixing
    return {
        "id": side or MODEL,
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

    def read() -> list[int]:
        if body.messages is not None:
            variables = {
                **service.settings.chat_template_kwargs[1],
                **(body.chat_template_kwargs or {}),
            }
            return teacher.encode_chat([message.plain for message in body.messages], variables)
        return teacher.encode(
            body.prompt or "", add_special_tokens=body.add_special_tokens is not False
        )

    ids = await service.read(read, body.size)
    found: Tokenized = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
    if body.return_token_strs:
        found["token_strs"] = [service.vocabulary.text(i) for i in ids]
    return as_json(found)


async def detokenize(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, DetokenizeBody, service.settings.max_body_bytes)
    service.require_model(body.model)
    size = service.pair.mixing.teacher.logit_size
    if body.tokens and max(body.tokens) >= size:
        raise InvalidRequest(f"tokens holds {max(body.tokens)}.", f"Ids run from 0 to {size - 1}.")
    text = await service.read(lambda: service.vocabulary.decode(body.tokens), body.size)
    return as_json({"prompt": text})


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

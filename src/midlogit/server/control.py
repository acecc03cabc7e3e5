"""vLLM's control plane for trainers, for the base alone: weights, pauses and caches; knows routes, no engine.

Its routes, bodies and answers are those of vLLM's servers in development mode, which the clients of TRL and others
speak. They exist with --train alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast, get_args

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from midlogit.engines.base import Pausing, Updating
from midlogit.server.body import read_body, require_json
from midlogit.server.errors import ApiError
from midlogit.server.routes import as_json
from midlogit.server.service import Service
from midlogit.server.streaming import while_connected
from midlogit.server.weights import FileTransport, Transport, Version
from midlogit.server.wire.control import (
    AbortBody,
    CheckBody,
    DiskBody,
    FinishBody,
    InitBody,
    StartBody,
    UpdateBody,
)
from midlogit.server.wire.requests import Body, validated

B = TypeVar("B", bound=Body)

# What slime asks of an SGLang server that it did not start itself.
ONE_ENGINE = {"tp_size": 1, "pp_size": 1, "enable_memory_saver": False}


async def server_info(http: Request, service: Service) -> Any:
    """The part of vLLM's configuration that clients read."""
    transport = service.transport
    return {
        "vllm_config": {
            "weight_transfer_config": None if transport is None else {"backend": transport.backend},
            "model_config": {
                "logprobs_mode": "processed_logprobs",  # log q of what was sampled
                "max_model_len": service.max_model_len,
            },
        },
        **ONE_ENGINE,
    }


async def world_size(http: Request, service: Service) -> Any:
    """How many processes of the base take part in a transfer."""
    return {"world_size": await _transport(service).world_size()}


async def init(http: Request, service: Service) -> Any:
    body = await _body(http, InitBody, service)
    await _transport(service).init(body.init_info)
    return {"message": "Weight transfer initialized"}


async def start(http: Request, service: Service) -> Any:
    body = await _body(http, StartBody, service)
    if not body.is_checkpoint_format:
        raise ApiError(400, "unsupported_option", "Weights come under the checkpoint's names.")
    await _transport(service).start()
    return {"message": "Weight update started"}


async def update(http: Request, service: Service) -> Any:
    """A part of an update; or, with weight_dir, a whole one."""
    body = await _body(http, UpdateBody, service)
    if body.weight_dir is not None:
        await _apply(service, body.weight_dir, None)
    else:
        work = _transport(service).update(body.update_info or {})
        await while_connected(http.receive, work)
    return {"message": "Weights updated"}


async def update_from_disk(http: Request, service: Service) -> Any:
    """A whole update in one call, as SGLang's servers take it."""
    body = await _body(http, DiskBody, service)
    await _apply(service, body.model_path, body.weight_version)
    return {"success": True, "message": "Weights updated"}


async def finish(http: Request, service: Service) -> Any:
    body = await _body(http, FinishBody, service)
    await _transport(service).finish(body.weight_version)
    return {"message": "Weight update finished"}


async def weight_info(http: Request, service: Service) -> Any:
    return {"weight_version": service.pair.base_version}


async def weight_checker(http: Request, service: Service) -> Any:
    """A checksum of the base's weights, which a trainer can make of its own to see that all have come."""
    await _body(http, CheckBody, service)
    engine = service.pair.engine
    if not isinstance(engine, Updating):
        raise ApiError(400, "unsupported_option", "This engine's weights cannot be read.")
    return {"checksums": {"base": str(await asyncio.to_thread(engine.base_checksum))}}


async def reset_prefix_cache(http: Request, service: Service) -> Any:
    """An update has cleared the base's cache; the teacher's stays valid."""
    return {"success": True}


async def pause(http: Request, service: Service) -> Any:
    mode = http.query_params.get("mode", "abort")
    if mode not in get_args(Pausing):
        raise ApiError(400, "invalid_request", f"mode is {mode!r:.80}. Use abort, wait or keep.")
    await asyncio.to_thread(service.pair.pause, cast(Pausing, mode))
    service.paused = True
    return {"status": "paused"}


async def resume(http: Request, service: Service) -> Any:
    await asyncio.to_thread(service.pair.resume)
    service.paused = False
    return {"status": "resumed"}


async def is_paused(http: Request, service: Service) -> Any:
    return {"is_paused": service.paused}


async def abort_requests(http: Request, service: Service) -> Any:
    """Ends everything that waits or runs, with what it has."""
    body = await _body(http, AbortBody, service)
    if body.request_ids or not body.abort_all:
        raise ApiError(400, "unsupported_option", "Leave request_ids out: all are aborted.")
    aborted = service.gate.running + service.gate.waiting
    await asyncio.to_thread(service.pair.pause, "abort")
    if not service.paused:
        await asyncio.to_thread(service.pair.resume)
    return {"status": "aborted", "aborted": aborted}


async def loads(http: Request, service: Service) -> Any:
    """How many completions run or wait."""
    gate = service.gate
    return {"loads": [{"num_running_reqs": gate.running, "num_waiting_reqs": gate.waiting}]}


async def _apply(service: Service, path: str, version: Version) -> None:
    transport = _transport(service)
    if not isinstance(transport, FileTransport):
        raise ApiError(400, "unsupported_option", "Start the server with --weights-root FOLDER.")
    await transport.apply([await asyncio.to_thread(transport.read, path)], version)


def _transport(service: Service) -> Transport:
    _ = service.pair
    if service.transport is None:
        raise ApiError(
            400,
            "no_weight_transfer",
            "NCCL needs --engine vllm, or servers of the base that were started with --weight-transfer-config"
            " and VLLM_SERVER_DEV_MODE=1. Start with --weights-root FOLDER for weights from files.",
        )
    return service.transport


async def _body(http: Request, kind: type[B], service: Service) -> B:
    """The body, which may be missing where every field may be."""
    if http.headers.get("content-length", "0") == "0" and "transfer-encoding" not in http.headers:
        return validated({}, kind)
    return await read_body(http, kind, service.settings.max_body_bytes)


Handler = Callable[[Request, Service], Awaitable[Any]]


def _route(method: str, path: str, handler: Handler) -> Route:
    async def endpoint(http: Request) -> Response:
        # A page in a browser must not change weights just because its user can reach this server.
        if "origin" in http.headers or http.headers.get("sec-fetch-site", "none") != "none":
            raise ApiError(403, "forbidden", "Trainers call this, not pages of browsers.")
        if method == "POST" and "content-type" in http.headers:
            require_json(http)
        return as_json(await handler(http, http.app.state.service))

    return Route(path, endpoint, methods=[method])


ROUTES = [
    _route("GET", "/server_info", server_info),
    _route("GET", "/get_world_size", world_size),
    _route("POST", "/init_weight_transfer_engine", init),
    _route("POST", "/start_weight_update", start),
    _route("POST", "/update_weights", update),
    _route("POST", "/update_weights_from_disk", update_from_disk),
    _route("POST", "/finish_weight_update", finish),
    _route("GET", "/weight_info", weight_info),
    _route("POST", "/weight_checker", weight_checker),
    _route("POST", "/reset_prefix_cache", reset_prefix_cache),
    _route("POST", "/pause", pause),
    _route("POST", "/resume", resume),
    _route("GET", "/is_paused", is_paused),
    _route("POST", "/abort_requests", abort_requests),
    # slime, as it calls SGLang's servers; weights by update_weights_from_disk
    _route("POST", "/pause_generation", pause),
    _route("POST", "/continue_generation", resume),
    _route("GET", "/flush_cache", reset_prefix_cache),
    _route("GET", "/get_weight_version", weight_info),
    _route("POST", "/abort_request", abort_requests),
    _route("GET", "/v1/loads", loads),
    # AReaL, as it calls its own server around vLLM
    _route("POST", "/areal_pause_generation", pause),
    _route("POST", "/areal_continue_generation", resume),
    _route("POST", "/areal_update_weights", update_from_disk),
]

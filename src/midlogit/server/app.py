"""The ASGI application: routes, middleware, the page; knows which handler answers what."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import get_args

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from midlogit.look import filled
from midlogit.server import control, routes
from midlogit.server.alone import Side
from midlogit.server.boundary import Boundary
from midlogit.server.chat import chat_completions
from midlogit.server.completions import completions
from midlogit.server.openapi import description
from midlogit.server.service import Service
from midlogit.server.tokens import generate

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)


def build_app(service: Service, load: Callable[[], None]) -> Starlette:
    """The ASGI application; `load` opens the pair in a thread of its own once the server listens."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        threading.Thread(target=load, name="midlogit-load", daemon=True).start()
        yield

    middleware = [Middleware(Boundary, service=service)]
    if service.settings.allow_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=[
            Route("/", page),
            Route("/health", routes.health),
            Route("/version", routes.version),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", openapi),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name}", routes.model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
            Route("/tokenizer_info", routes.tokenizer_info),
            *(training_routes() if service.settings.train else ()),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _to_the_boundary},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect would carry whatever Host the request has
    app.state.service = service
    return app


def training_routes() -> list[Route]:
    """Routes that trainers call: the control plane, and each model alone under its own prefix."""
    found = [*control.ROUTES, Route("/inference/v1/generate", generate, methods=["POST"])]
    for side in get_args(Side):
        found += [
            Route(f"/{side}/health", routes.health),
            Route(f"/{side}/v1/models", partial(routes.models, side=side)),
            Route(f"/{side}/v1/completions", partial(completions, side=side), methods=["POST"]),
            Route(f"/{side}/inference/v1/generate", partial(generate, side=side), methods=["POST"]),
        ]
    return found


async def page(_: Request) -> Response:
    """The live page: one file that loads nothing from any other site."""
    content = filled((files("midlogit.server") / "page.html").read_text(encoding="utf-8"))
    headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
    return Response(content, headers=headers, media_type="text/html")


async def openapi(http: Request) -> Response:
    service: Service = http.app.state.service
    return await service.lanes.compute(lambda: routes.as_json(description()))


async def _to_the_boundary(_: Request, error: Exception) -> Response:
    raise error

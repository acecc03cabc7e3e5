"""The edge of the server: request ids, keys, and an error body for every failure; knows no route's work.

Plain ASGI, so that a disconnect reaches the route at once.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
import uuid
from contextlib import suppress
from urllib.parse import unquote

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from midlogit.errors import MidlogitError
from midlogit.server.errors import ApiError, from_midlogit
from midlogit.server.logs import logger, request_id, where
from midlogit.server.service import Service
from midlogit.server.streaming import ClientGone

OPEN_PATHS = (
    "/",
    "/health",
    "/base/health",
    "/teacher/health",
    "/version",
    "/metrics",
    "/openapi.json",
)
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::\d+)?", re.ASCII)
API_PATHS = ("/chat/completions", "/completions", "/models")
QUIET_PATHS = ("/health", "/base/health", "/teacher/health", "/metrics")


class Boundary:
    """Middleware around all routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keys = [hashlib.sha256(key.encode()).digest() for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        headers = Headers(scope=scope)
        token = request_id.set(self._id_of(headers))
        body = scope["body"] = self._service.bodies.open()
        try:
            await self._answer(scope, receive, send, headers)
        finally:
            body.close()
            request_id.reset(token)

    def _id_of(self, headers: Headers) -> str:
        """The request's own id, unless it is none or holds what must not be shown."""
        given = headers.get("x-request-id", "")
        is_fit = REQUEST_ID.fullmatch(given) and self._service.redact(given) == given
        return given if is_fit else uuid.uuid4().hex

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        status, start = 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id.get() or ""
            await send(message)

        try:
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            status = 499
            self._service.metrics.failed("client_gone")
        except Exception as error:  # the last place where a failure can become a response
            problem = self._problem(error, scope["path"])
            if scope["path"] not in QUIET_PATHS:
                self._service.metrics.failed(problem.code)
            if status == 0:
                response = Response(
                    orjson.dumps(problem.told(self._service.redact)),
                    problem.status,
                    problem.headers,
                    "application/json",
                )
                await response(scope, receive, send_with_id)

        if scope["path"] not in QUIET_PATHS:
            facts = {"status": status, "seconds": round(time.perf_counter() - start, 4)}
            logger.info("%.20s %.200s", scope["method"], scope["path"], extra={"facts": facts})

    def _check_host(self, headers: Headers) -> None:
        """Refuses requests that call the server by another's name, as those of a browser on another site's page do.

        Raises:
            ApiError: 403.
        """
        for given in headers.getlist("host"):
            if not self._service.settings.is_called(_name_of(given)):
                raise ApiError(
                    403,
                    "unknown_host",
                    f"This server is not called {given!r:.80}.",
                    "Call it by its address, or start it with --allowed-host.",
                )

    def _check_key(self, path: str, headers: Headers) -> None:
        """Checks the request's key; compares it with every key, so that the time tells nothing.

        Raises:
            ApiError: 401 without a valid key.
        """
        if not self._keys or unquote(path) in OPEN_PATHS:
            return

        digest = hashlib.sha256(_key_of(headers.get("authorization", "")).encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if not any(matches):
            raise ApiError(
                401,
                "invalid_api_key",
                "Send a valid key as Authorization: Bearer KEY.",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _problem(self, error: Exception, path: str) -> ApiError:
        if isinstance(error, MidlogitError):
            error = from_midlogit(error)
        if isinstance(error, HTTPException):
            code = {404: "not_found", 405: "method_not_allowed"}.get(
                error.status_code, "invalid_request"
            )
            message, hint = str(error.detail), ""
            if error.status_code == 404:
                message, hint = f"Nothing is at {path:.150}.", _meant(path)
            error = ApiError(error.status_code, code, message, hint, headers=error.headers)
        if isinstance(error, ApiError):
            return error
        logger.error("%s at %s: %s", type(error).__name__, where(error), error)
        return ApiError(500, "server_error", "The server failed; its log says how.")


def _name_of(host: str) -> str:
    """The name or address in a Host header, without the port; empty where it holds none."""
    found = HOST.fullmatch(host)
    return found[1].strip("[]") if found else ""


def _key_of(authorization: str) -> str:
    """The key of a header: a bearer's, or the password of a URL such as http://any:KEY@host:8000."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if scheme.lower() != "basic":
        return ""
    with suppress(ValueError):  # no base64, no text
        return base64.b64decode(given).decode().partition(":")[2]
    return ""


def _meant(path: str) -> str:
    """What to do about a 404, for a client whose base URL lacks /v1 or has it twice, or whose path ends in a slash."""
    meant = next((f"/v1{end}" for end in API_PATHS if path.rstrip("/").endswith(end)), None)
    return f"Did you mean {meant}? The base URL of a client ends in /v1, once." if meant else ""

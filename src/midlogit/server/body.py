"""Reads the body of a request and checks its size, its JSON and its type; knows no particular field.

What a body costs to parse grows with the values in it, and while it is parsed nothing else runs: so it may have only so
many. They are counted before, by the commas and brackets.
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request

from midlogit.server.errors import ApiError
from midlogit.server.lanes import LONG_BODY
from midlogit.server.service import Service
from midlogit.server.wire.requests import Body, validated

B = TypeVar("B", bound=Body)

MOST_VALUES = (
    2**19
)  # of a body; four times as many for a trainer, whose batches nobody else waits for
VALUES_OF_CONTAINER = 8  # what an array or an object costs, in values
DRAINED = 16  # oversized bodies up to this many times the limit are drained, so that the client receives the 413


async def read_body(request: Request, kind: type[B], limit: int) -> B:
    """The body, validated as `kind`.

    Raises:
        ApiError: 400 malformed JSON or an option that cannot be honoured, 413 too large, 415 not JSON,
            422 of a wrong type or out of range, 503 when too many large bodies are held.
    """
    service: Service = request.app.state.service
    require_json(request)
    parts, size = await _read(request, limit)
    if size <= LONG_BODY:
        return _parsed(b"".join(parts), kind)
    most = MOST_VALUES * (4 if service.settings.train else 1)
    return await service.lanes.check(partial(_parsed_if_few, parts, kind, most))


def require_json(request: Request) -> None:
    """Refuses the types of bodies that pages of any site can send.

    Raises:
        ApiError: 415.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "not_json", "Send the body as Content-Type: application/json.")


def _require_few_values(data: bytes, most: int) -> None:
    """Refuses a body whose JSON has too many values.

    Raises:
        ApiError: 413.
    """
    if len(data) <= most:
        return
    containers = len(data) - len(data.translate(None, b"[{"))
    commas = len(data) - len(data.translate(None, b","))
    values = commas + VALUES_OF_CONTAINER * containers
    if values > most:
        raise ApiError(
            413,
            "body_too_large",
            f"The body has {commas} commas and {containers} opening brackets, which count"
            f" {VALUES_OF_CONTAINER} times; together they may be {most}.",
            "Split the request.",
        )


def _parsed_if_few(parts: list[bytes], kind: type[B], most: int) -> B:
    data = b"".join(parts)
    _require_few_values(data, most)
    return _parsed(data, kind)


def _parsed(data: bytes, kind: type[B]) -> B:
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "malformed_json", f"The body is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ApiError(422, "invalid_type", "The body must be a JSON object.")

    body = validated(fields, kind)
    body._size = len(data)
    return body


async def _read(request: Request, limit: int) -> tuple[list[bytes], int]:
    """The parts of the body, and its size in bytes."""
    too_large = ApiError(413, "body_too_large", f"The body is larger than {limit} bytes.")
    held = request.scope["body"]
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > DRAINED * limit:
        raise too_large

    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                held.grow(len(part))
                parts.append(part)
            elif size > DRAINED * limit:
                break
    except ClientDisconnect:
        raise ApiError(
            400, "client_gone", "The client went away before its body was read."
        ) from None

    if size > limit:
        raise too_large
    return parts, size

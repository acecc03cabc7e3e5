"""Reads the body of a request and checks its size, its JSON and its type; knows no particular field."""

from __future__ import annotations

from typing import TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request

from midlogit.server.errors import ApiError
from midlogit.server.wire.requests import Body, validated

B = TypeVar("B", bound=Body)

DRAINED = 16  # oversized bodies up to this many times the limit are drained, so that the client receives the 413


async def read_body(request: Request, kind: type[B], limit: int) -> B:
    """The body, validated as `kind`.

    Raises:
        ApiError: 400 malformed JSON or an option that cannot be honoured, 413 too large, 415 not JSON,
            422 of a wrong type or out of range.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "not_json", "Send the body as Content-Type: application/json.")

    data = await _read(request, limit)
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "malformed_json", f"The body is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ApiError(422, "invalid_type", "The body must be a JSON object.")

    body = validated(fields, kind)
    body._size = len(data)
    return body


async def _read(request: Request, limit: int) -> bytes:
    too_large = ApiError(413, "body_too_large", f"The body is larger than {limit} bytes.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > DRAINED * limit:
        raise too_large

    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > DRAINED * limit:
                break
    except ClientDisconnect:
        raise ApiError(
            400, "client_gone", "The client went away before its body was read."
        ) from None

    if size > limit:
        raise too_large
    return b"".join(parts)

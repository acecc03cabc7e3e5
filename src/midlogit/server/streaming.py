"""Server-Sent Events, and work that ends when its client disconnects; knows bytes and connections, no answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
PART = 2**18  # bytes of a body that are written at once


class ClientGone(Exception):
    """The client disconnected before its answer was ready."""


def event(data: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client disconnects.

    Args:
        receive: of a request whose body has been read.

    Raises:
        ClientGone: the client disconnected.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, gone):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JsonParts(Response):
    """A JSON body in parts, so that a large one is neither copied nor written at once.

    Args:
        parts: what stands between head and tail, separated by commas.
    """

    def __init__(self, head: bytes, parts: Sequence[bytes], tail: bytes) -> None:
        self.status_code = 200
        self.background = None
        self.media_type = "application/json"
        self._pieces = [head, *(piece for part in parts for piece in (part, b",")), tail]
        if parts:
            del self._pieces[-2]
        size = sum(map(len, self._pieces))
        self.init_headers({"Content-Length": str(size)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for part in self._grouped():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _grouped(self) -> Iterator[bytes]:
        """The body in parts of about PART bytes."""
        waiting: list[bytes] = []
        size = 0
        for piece in self._pieces:
            for start in range(0, len(piece), PART):
                waiting.append(piece[start : start + PART])
                size += len(waiting[-1])
                if size >= PART:
                    yield b"".join(waiting)
                    waiting, size = [], 0
        yield b"".join(waiting)


class EventStream(Response):
    """A response of Server-Sent Events; calls `close` when it ends, however it ends."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        self.status_code = 200
        self.background = None
        self.media_type = "text/event-stream"
        self._chunks = chunks
        self._close = close
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._chunks.aclose()

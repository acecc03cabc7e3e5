"""One HTTP request and its answer over a connection of aiohttp's pool; knows no JSON and nothing of failures.

Works below aiohttp's session, which spends 0.25 ms per request before the first byte, while no server works. The head
that all requests to one address share is made once; aiohttp connects, keeps connections and parses answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

from midlogit.extras import require

T = TypeVar("T")

KEEP_ALIVE = (
    4.0  # below uvicorn's 5 s, so that the server never closes a connection we are about to use
)
CONNECT_TIMEOUT = 10.0


class Answer(NamedTuple):
    """A whole HTTP answer."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class ConnectionPool:
    """The connections to all servers; lives in one loop.

    Args:
        size: most connections at once. timeout: seconds per exchange.
    """

    def __init__(self, size: int, timeout: float) -> None:
        aiohttp = require("aiohttp", "http")
        self.timeout = timeout
        self.connecting = aiohttp.ClientTimeout(sock_connect=min(CONNECT_TIMEOUT, timeout))
        self.connector = aiohttp.TCPConnector(limit=size, keepalive_timeout=KEEP_ALIVE)
        self._used: WeakSet[Any] = WeakSet()  # protocols of connections that have served a call

    async def connect(self, request: Any, *, fresh: bool) -> Any:
        """A connection on which nothing waits to be read.

        Args:
            fresh: whether it must have served no call before. Kept ones to the same server are closed then.
        """
        while True:
            connection = await self.connector.connect(request, [], self.connecting)
            protocol = connection.protocol
            is_used = protocol in self._used
            # aiohttp keeps a connection on which something arrives after its answer.
            if not is_used or not (fresh or protocol.should_close):
                self._used.add(protocol)
                return connection
            connection.close()

    async def close(self) -> None:
        await self.connector.close()


class Address:
    """The method, URL and headers that requests of one kind share."""

    def __init__(
        self, pool: ConnectionPool, method: str, url: str, headers: Mapping[str, str]
    ) -> None:
        aiohttp, yarl = require("aiohttp", "http"), require("yarl", "http")
        self._pool = pool
        self._request = aiohttp.ClientRequest(
            method, yarl.URL(url), headers=headers, loop=asyncio.get_running_loop()
        )
        lines = [
            f"{name}: {value}\r\n"
            for name, value in self._request.headers.items()
            if name != "Content-Length"
        ]
        self._head = f"{method} {self._request.url.raw_path_qs} HTTP/1.1\r\n{''.join(lines)}Content-Length: ".encode()

    async def exchange(self, body: bytes, read: Callable[[Answer], T], *, fresh: bool) -> T:
        """Sends a request; returns what `read` makes of the answer.

        The connection is kept for other calls only after `read` has taken the answer.

        Raises:
            TimeoutError: no answer within the pool's timeout.
            OSError, ValueError, aiohttp's ClientError and HttpProcessingError: no connection, or no whole HTTP answer.
        """
        async with asyncio.timeout(self._pool.timeout):
            connection = await self._pool.connect(self._request, fresh=fresh)
            try:
                self.send(connection.protocol, body)
                connection.protocol.set_response_params(read_until_eof=True)
                message: Any = None
                while message is None or message.code < 200:  # 1xx announces an answer
                    message, payload = await connection.protocol.read()
                answer = Answer(message.code, message.headers, await payload.read())
                result = read(answer)
            except BaseException:
                connection.close()
                raise
            connection.release()
        return result

    def send(self, protocol: Any, body: bytes) -> None:
        """Writes a request to a connection's protocol."""
        protocol.transport.write(b"%s%d\r\n\r\n%s" % (self._head, len(body), body))

"""JSON calls to servers, made in a thread of its own; knows HTTP, retryable failures and keys, no models.

Everything here runs in one asyncio loop in a background thread. Other threads hand it coroutines by `run`.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import orjson

from midlogit.engines.http.exchange import Address, Pool
from midlogit.engines.http.urls import shown, suggestion, what_is_wrong
from midlogit.errors import InvalidRequest, ServerUnavailable
from midlogit.extras import require

T = TypeVar("T")

BACKOFF = (0.25, 1.0, 4.0)  # seconds before each retry; three of them outlast a server's restart of 5 s
MAX_WAIT = 60.0  # the longest Retry-After that is honoured
RETRYABLE_STATUSES = (408, 429)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server of one side.

    Attributes:
        side: "base" or "teacher". url: the OpenAI root, ending in /v1. key: sent as a bearer token, never shown.
    """

    side: str
    url: str
    key: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Side and URL, for messages; what the URL holds before an @ is left out."""
        return f"{self.side} {shown(self.url)}"

    @property
    def at_root(self) -> Endpoint:
        """The OpenAI root that was meant: up to the /v1 inside the URL, else one below it."""
        before, inside, _ = self.url.partition("/v1/")
        return replace(self, url=(before if inside else self.url) + "/v1")

    def address(self, path: str) -> str:
        """Of an OpenAI path such as "/models"; "//tokenize" lies beside /v1, not below it."""
        if path.startswith("//"):
            return self.url.removesuffix("/v1") + path[1:]
        return self.url + path


def endpoint(side: str, url: str, key: str | None) -> Endpoint:
    """Checks a URL as the user gave it; blanks around it and slashes at its end do not count.

    Raises:
        InvalidRequest: no http or https URL of a server, or a key that no header can hold.
    """
    url = url.strip()
    reason = what_is_wrong(url)
    if reason is not None:
        raise InvalidRequest(f"The {side} URL {shown(url)!r} is not an http URL: {reason}.", suggestion(url))
    if key and not key.isprintable():
        raise InvalidRequest(f"The {side} API key holds a line break.", "Give it without.")
    return Endpoint(side, urlunsplit(urlsplit(url)).rstrip("/"), key)


class CallFailed(Exception):
    """One call that gave no usable answer.

    Attributes:
        message: what happened, without side and URL. status: of the HTTP answer, None when there was none.
        retryable: whether the same call may succeed. wait: seconds the server asked to wait, None if it did not.
        healthy: whether the server is well all the same, and may be asked again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retryable: bool = True,
        wait: float | None = None,
        healthy: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.retryable = retryable
        self.wait = wait
        self.healthy = healthy


class Client:
    """The loop, its thread and the connection pool of one Pair.

    Args:
        pool: most connections at once, to all servers together. timeout: seconds for one call.
        retries: how often a call is tried again after a retryable failure.
    """

    def __init__(self, *, pool: int, timeout: float, retries: int) -> None:
        self._aiohttp = require("aiohttp", "http")
        self.pool = pool
        self.retries = retries
        self._timeout = timeout
        self._connections: Pool | None = None
        self._addresses: dict[tuple[Endpoint, str, bool], Address] = {}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run_loop, name="midlogit-http", daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the loop from any other thread and waits for it."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result()

    async def once(self, server: Endpoint, path: str, body: dict[str, Any] | None = None) -> Any:
        """One attempt: a GET without a body, else a POST; the decoded JSON.

        Raises:
            CallFailed: anything else than a 200 with JSON.
        """
        aiohttp = self._aiohttp
        try:
            address = self._address(server, path, body is not None)
            status, headers, content = await address.exchange(b"" if body is None else orjson.dumps(body))
        except TimeoutError:
            raise CallFailed(f"no answer within {self._timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise CallFailed(f"{_reason(error)}") from error
        except (aiohttp.http.HttpProcessingError, ValueError) as error:  # aiohttp's parsers
            raise CallFailed(f"not an HTTP answer: {_reason(error)}") from error
        if 300 <= status < 400:  # followed, it would cost every call a second one, and could take the key elsewhere
            where = headers.get("Location")
            raise CallFailed(f"HTTP {status}: it redirects to {where}", status=status, retryable=False)
        if status != 200:
            reason, whole = _server_message(content)
            retryable = status in RETRYABLE_STATUSES or status >= 500 or not whole
            raise CallFailed(
                f"HTTP {status}: {reason}",
                status=status,
                retryable=retryable,
                wait=_seconds(headers.get("Retry-After")),
            )
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError:
            raise CallFailed("the answer is not whole JSON") from None

    async def call(
        self, server: Endpoint, path: str, body: dict[str, Any] | None = None, *, silence: bool = True
    ) -> Any:
        """`once`, tried again after retryable failures; `silence` tells whether no answer at all is one."""
        for attempt in range(self.retries + 1):
            try:
                return await self.once(server, path, body)
            except CallFailed as failure:
                if attempt == self.retries or not failure.retryable or (failure.status is None and not silence):
                    raise
                await asyncio.sleep(self.wait(attempt, failure))
        raise AssertionError

    def wait(self, attempt: int, failure: CallFailed) -> float:
        """Seconds before the next attempt: exponential with jitter, or what the server asked for."""
        backoff = BACKOFF[min(attempt, len(BACKOFF) - 1)] * random.uniform(1.0, 1.25)
        return backoff if failure.wait is None else max(min(failure.wait, MAX_WAIT), 0.0)

    def close(self) -> None:
        """Closes the connections and ends the thread; what still runs is cancelled."""
        if self.loop.is_closed():
            return
        self.run(self._shut())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _shut(self) -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        if self._connections is not None:
            await self._connections.close()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _address(self, server: Endpoint, path: str, posts: bool) -> Address:
        key = server, path, posts
        if key not in self._addresses:
            if self._connections is None:  # it is made in the loop, where it lives
                self._connections = Pool(self.pool, self._timeout)
            headers = {"Content-Type": "application/json"}
            if server.key:
                headers["Authorization"] = f"Bearer {server.key}"
            method = "POST" if posts else "GET"
            self._addresses[key] = Address(self._connections, method, server.address(path), headers)
        return self._addresses[key]


def unavailable(server: Endpoint, failure: CallFailed, hint: str = "") -> ServerUnavailable:
    """The failure as the error a user meets, naming side and URL."""
    return ServerUnavailable(f"The server of the {server.name} cannot be used: {failure.message}.", hint)


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _server_message(content: bytes) -> tuple[str, bool]:
    """What the server says went wrong, as vLLM writes it, else the beginning; and whether all of it came."""
    text = content[:200].decode(errors="replace").strip() or "no reason given"
    try:
        error = orjson.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error), True
    except orjson.JSONDecodeError:
        return text, not content.startswith(b"{")
    except (KeyError, TypeError):
        return text, True


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header: seconds, or a date."""
    if retry_after is None:
        return None
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time()
    except ValueError:
        return None

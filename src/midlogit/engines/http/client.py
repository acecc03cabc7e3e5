"""JSON calls to servers from a background thread; knows HTTP, retryable failures and keys, no models.

Everything here runs in one asyncio loop in that thread. Other threads hand it coroutines by `run`.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import orjson

from midlogit.engines.http.exchange import Address, Answer, ConnectionPool
from midlogit.engines.http.urls import shown, suggestion, what_is_wrong
from midlogit.errors import InvalidRequest, ServerUnavailable, first_line
from midlogit.extras import require

T = TypeVar("T")

BACKOFF = (
    0.25,
    1.0,
    4.0,
)  # seconds before each retry; together they outlast a server's restart of 5 s
MAX_WAIT = 60.0  # the longest Retry-After that is honoured
JSON = "application/json"
RETRYABLE_STATUSES = (408, 429)
UNUSABLE_STATUSES = (401, 403, 404, *RETRYABLE_STATUSES)  # of the server, whatever the request


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
        """Side and URL, for messages; user and password before an @ are left out."""
        return f"{self.side} {shown(self.url)}"

    @property
    def at_root(self) -> Endpoint:
        """The OpenAI root that was probably meant: the URL up to its first /v1, else with /v1 appended."""
        before, inside, _ = self.url.partition("/v1/")
        return replace(self, url=(before if inside else self.url) + "/v1")

    def address(self, path: str) -> str:
        """The URL of an OpenAI path such as "/models"; "//tokenize" is beside /v1, not below it."""
        if path.startswith("//"):
            return self.url.removesuffix("/v1") + path[1:]
        return self.url + path


def endpoint(side: str, url: str, key: str | None) -> Endpoint:
    """The server at a URL as the user gave it; surrounding blanks and trailing slashes are dropped.

    Raises:
        InvalidRequest: not the http or https URL of a server, or a key that no header can hold.
    """
    url = url.strip()
    reason = what_is_wrong(url)
    if reason is not None:
        raise InvalidRequest(
            f"The {side} URL {shown(url)!r} is not an http URL: {reason}.", suggestion(url)
        )

    if key and not key.isprintable():
        raise InvalidRequest(f"The {side} API key holds a line break.", "Remove it.")
    return Endpoint(side, urlunsplit(urlsplit(url)).rstrip("/"), key)


class CallFailed(Exception):
    """A call without a usable answer.

    Attributes:
        message: what happened, without side and URL. status: of the HTTP answer, None when there was none.
        retryable: whether the same call may succeed later. wait: seconds that the server asked to wait, else None.
        healthy: whether the server itself is well, so that it may be called again.
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

    @property
    def is_refusal(self) -> bool:
        """Whether the server works and refuses this very request."""
        status = self.status
        return status is not None and 400 <= status < 500 and status not in UNUSABLE_STATUSES

    @property
    def is_broken_answer(self) -> bool:
        """Whether the server answered the call, but not what was asked."""
        return self.status == 200


class BrokenAnswer(CallFailed):
    """A 200 whose content cannot be the answer to its call; the same call may be answered rightly later."""

    def __init__(self, message: str, *, healthy: bool = False) -> None:
        super().__init__(message, status=200, healthy=healthy)


class Client:
    """The loop, its thread and the connection pool of one Pair.

    Args:
        pool: most connections at once, to all servers together. timeout: seconds per call.
        retries: how often a call is repeated after a retryable failure.
    """

    def __init__(self, *, pool: int, timeout: float, retries: int) -> None:
        self._aiohttp = require("aiohttp", "http")
        self.pool = pool
        self.retries = retries
        self._timeout = timeout
        self._connections: ConnectionPool | None = None
        self._addresses: dict[tuple[Endpoint, str, bool], Address] = {}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run_loop, name="midlogit-http", daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the loop from any other thread and waits for it."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result()

    async def call_once(
        self,
        server: Endpoint,
        path: str,
        body: dict[str, Any] | None = None,
        read: Callable[[Any], Any] = lambda content: content,
        *,
        fresh: bool = False,
    ) -> Any:
        """Makes one attempt, a GET without a body, else a POST.

        Args:
            read: makes the result of the decoded JSON, or raises where that cannot be the answer to this call.
            fresh: whether to open a connection for it, rather than use one that served other calls.

        Raises:
            CallFailed: anything but a 200 with JSON. BrokenAnswer: JSON that `read` cannot use.
        """
        aiohttp = self._aiohttp
        content = b"" if body is None else orjson.dumps(body)
        try:
            address = self._address(server, path, body is not None)
            return await address.exchange(
                content, lambda answer: _read_answer(answer, read), fresh=fresh
            )
        except TimeoutError:
            raise CallFailed(f"no answer within {self._timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise CallFailed(first_line(error)) from error
        except (aiohttp.http.HttpProcessingError, ValueError) as error:  # aiohttp's parsers
            raise CallFailed(f"not an HTTP answer: {first_line(error)}") from error

    async def call(
        self,
        server: Endpoint,
        path: str,
        body: dict[str, Any] | None = None,
        read: Callable[[Any], Any] = lambda content: content,
        *,
        retry_unreachable: bool = True,
    ) -> Any:
        """`call_once`, repeated after retryable failures.

        Args:
            retry_unreachable: whether the lack of any HTTP answer counts as retryable.
        """
        for attempt in range(self.retries + 1):
            try:
                return await self.call_once(server, path, body, read, fresh=attempt > 0)
            except CallFailed as failure:
                is_retryable = failure.retryable and (
                    failure.status is not None or retry_unreachable
                )
                if attempt == self.retries or not is_retryable:
                    raise
                await asyncio.sleep(self.backoff(attempt, failure))
        raise AssertionError

    def backoff(self, attempt: int, failure: CallFailed) -> float:
        """Seconds before the next attempt: exponential with jitter, or as the server asked for."""
        if failure.wait is not None:
            return min(failure.wait, MAX_WAIT)
        return BACKOFF[min(attempt, len(BACKOFF) - 1)] * random.uniform(1.0, 1.25)

    def close(self) -> None:
        """Cancels running calls, closes the connections and ends the thread."""
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
            if self._connections is None:  # made in the loop that it belongs to
                self._connections = ConnectionPool(self.pool, self._timeout)
            headers = {"Content-Type": JSON}
            if server.key:
                headers["Authorization"] = f"Bearer {server.key}"
            method = "POST" if posts else "GET"
            self._addresses[key] = Address(self._connections, method, server.address(path), headers)
        return self._addresses[key]


def unavailable(server: Endpoint, failure: CallFailed, hint: str = "") -> ServerUnavailable:
    """The failure as an error for the user, with side and URL."""
    return ServerUnavailable(
        f"The server of the {server.name} cannot be used: {failure.message}.", hint
    )


def _read_answer(answer: Answer, read: Callable[[Any], Any]) -> Any:
    """What `read` makes of an answer.

    Raises:
        CallFailed: as `Client.call_once`.
    """
    status, headers, content = answer
    if (
        300 <= status < 400
    ):  # followed, it would cost every call a second one, and could take the key elsewhere
        where = headers.get("Location")
        raise CallFailed(f"HTTP {status}: it redirects to {where}", status=status, retryable=False)

    if status != 200:
        reason, whole = _server_message(content)
        is_retryable = not 400 <= status < 500 or status in RETRYABLE_STATUSES or not whole
        raise CallFailed(
            f"HTTP {status}: {reason}",
            status=status,
            retryable=is_retryable,
            wait=_seconds(headers.get("Retry-After")),
        )

    kind = headers.get("Content-Type", JSON).partition(";")[0].strip().lower()
    if kind != JSON:
        raise BrokenAnswer(f"the answer is {kind}, not JSON")
    try:
        decoded = orjson.loads(content)
    except orjson.JSONDecodeError:
        raise BrokenAnswer("the answer is not whole JSON") from None
    try:
        return read(decoded)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise BrokenAnswer(f"the answer is not of the form asked for ({error!r})") from None


def _server_message(content: bytes) -> tuple[str, bool]:
    """The server's error message in vLLM's form, else the beginning of its answer; and whether the answer is whole."""
    text = content[:200].decode(errors="replace").strip() or "no reason given"
    try:
        error = orjson.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error), True
    except orjson.JSONDecodeError:
        return text, not content.startswith(b"{")
    except (KeyError, TypeError):
        return text, True


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None for what says no time to wait."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time()
        except (ValueError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None

"""Bounds what the server takes on: rows that run and wait, bytes of bodies; knows no request and no engine."""

from __future__ import annotations

import math

from midlogit.server.errors import ApiError

RETRY_AFTER = "1"


class Gate:
    """Counts rows (completions to generate, texts to score) from their acceptance to their end.

    Args:
        max_running: rows that the engine runs at once; further rows wait.
        max_waiting: most rows that may wait; None for no limit.
        max_completions: most rows of one request.
    """

    def __init__(self, max_running: int, max_waiting: int | None, max_completions: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._most = math.inf if max_waiting is None else max_running + max_waiting
        self._most_of_one = min(self._most, max_completions)
        self._rows = 0

    @property
    def running(self) -> int:
        return min(self._rows, self._max_running)

    @property
    def waiting(self) -> int:
        return self._rows - self.running

    def require_possible(self, rows: int) -> None:
        """Refuses more rows than one request may have.

        Raises:
            ApiError: 400.
        """
        if rows > self._most_of_one:
            raise ApiError(
                400,
                "too_many_completions",
                f"The request asks for {rows} completions; it may have {self._most_of_one}. Split it.",
            )

    def enter(self, rows: int) -> Pass:
        """Accepts a request's rows.

        Raises:
            ApiError: 429 when they do not fit now.
        """
        if self._rows + rows > self._most:
            raise ApiError(
                429,
                "queue_full",
                f"{self.waiting} requests are waiting and at most {self._max_waiting} may. Try again.",
                headers={"Retry-After": RETRY_AFTER},
            )
        self._rows += rows
        return Pass(self, rows)

    def release(self, rows: int) -> None:
        self._rows -= rows


class Pass:
    """The rows of one request: call `leave` as each ends, `close` when the request ends."""

    def __init__(self, gate: Gate, rows: int) -> None:
        self._gate = gate
        self._left = rows

    def leave(self) -> None:
        """Releases one row, which has ended."""
        self._left -= 1
        self._gate.release(1)

    def close(self) -> None:
        """Releases all rows that have not ended."""
        self._gate.release(self._left)
        self._left = 0


class Bodies:
    """Bounds the bytes of all bodies that the server holds, from their first byte to the end of their answer."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    def open(self) -> Body:
        """The body of a request, of which nothing has come yet."""
        return Body(self)

    def hold(self, size: int) -> None:
        """Counts further bytes.

        Raises:
            ApiError: 503 when there is no room for them now.
        """
        if self._held + size > self._most:
            raise ApiError(
                503,
                "overloaded",
                "The server holds as many large requests as it may. Try again.",
                headers={"Retry-After": RETRY_AFTER},
            )
        self._held += size

    def release(self, size: int) -> None:
        self._held -= size


class Body:
    """The bytes of one body: call `grow` as they come, `close` when the request ends."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._size = 0

    def grow(self, size: int) -> None:
        """Counts further bytes.

        Raises:
            ApiError: 503 when there is no room for them now.
        """
        self._bodies.hold(size)
        self._size += size

    def close(self) -> None:
        self._bodies.release(self._size)
        self._size = 0

"""Counts the rows that the server has accepted and bounds those that wait; knows no request and no engine."""

from __future__ import annotations

import math

from midlogit.server.errors import ApiError

RETRY_AFTER = "1"


class Gate:
    """Counts rows (completions to generate, texts to score) from their acceptance to their end.

    Args:
        max_running: rows that the engine runs at once; further rows wait.
        max_waiting: most rows that may wait; None for no limit.
    """

    def __init__(self, max_running: int, max_waiting: int | None) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._most = math.inf if max_waiting is None else max_running + max_waiting
        self._rows = 0

    @property
    def running(self) -> int:
        return min(self._rows, self._max_running)

    @property
    def waiting(self) -> int:
        return self._rows - self.running

    def require_possible(self, rows: int) -> None:
        """Refuses more rows than could ever fit.

        Raises:
            ApiError: 400.
        """
        if rows > self._most:
            raise ApiError(
                400,
                "too_many_completions",
                f"The request asks for {rows} completions; at most {self._most} fit. Split it.",
            )

    def enter(self, rows: int) -> Pass:
        """Accepts a request's rows.

        Raises:
            ApiError: 400 when they could never fit, 429 when they do not fit now.
        """
        self.require_possible(rows)
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

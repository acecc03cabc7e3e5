"""Open connections: how many there may be, and how long each may keep the server waiting; knows sockets, no route.

uvicorn itself closes idle connections alone: a client that never ends its request, or never reads its answer, would
hold one for ever, and without a free descriptor nobody else could connect.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any, Literal

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from midlogit.server.logs import logger
from midlogit.server.settings import Patience

BACKLOG = 128  # connections that the kernel keeps until they are accepted
RESERVED = 64  # descriptors that connections leave to the rest of the process
LEAVING = 32  # connections beyond the bound, while those that make room for them are being closed
SEARCH_S = 0.02  # seconds between two searches for connections that can make room
REPORT_S = 10.0  # seconds between two log lines
BOUNDS = "bounds: --max-connections, ulimit -n"

Phase = Literal["head", "body", "work", "answer", "idle"]
Reason = Literal["head", "body", "answer", "idle", "room", "refused"]


class Connections:
    """The connections of one server.

    Attributes:
        open: how many there are.

    Args:
        most: that may be open; fewer where the process may not open so many descriptors.
        patience: seconds that a connection may spend in a phase.
        count: told of each connection that was closed, and why.
    """

    def __init__(self, most: int, patience: Patience, count: Callable[[Reason], None]) -> None:
        self.open = 0
        self._most = most
        self._patience = {
            "head": patience.head_s,
            "body": patience.body_s,
            "answer": patience.answer_s,
            "idle": patience.idle_s,
        }
        self._count = count
        self._first_reserved = first_reserved(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._state = ServerState()
        self._since: dict[H11Protocol, tuple[tuple[Any, ...], float]] = {}
        self._closable: list[H11Protocol] = []  # the one to be closed first at the end
        self._searched = self._reported = -REPORT_S
        self._closed: Counter[Reason] = Counter()

    def watch(self, state: ServerState) -> None:
        """Takes the state of the uvicorn server that the connections belong to."""
        self._state = state

    def admits(self, descriptor: int) -> bool:
        """Whether a new connection with this descriptor may stay, in the place of one that keeps the server waiting."""
        beyond = max(self.open - self._most, descriptor - self._first_reserved)
        if beyond < 0:
            return True
        closed = [self._make_room() for _ in range(2)]  # two for one, to get back below the bound
        if any(closed) and beyond < LEAVING:
            return True
        self._note("refused")
        return False

    def opened(self) -> None:
        self.open += 1

    def closed(self) -> None:
        self.open -= 1

    async def keep(self, every_s: float = 1.0) -> None:
        """Closes connections that take too long, until it is cancelled."""
        while True:
            self._close_slow()
            self._report()
            await asyncio.sleep(every_s)

    def close(self) -> None:
        """Closes every connection, whatever it is doing."""
        for connection in self._all():
            connection.transport.abort()

    def _all(self) -> Iterable[H11Protocol]:
        return [c for c in self._state.connections if isinstance(c, H11Protocol)]

    def _close_slow(self) -> None:
        now = monotonic()
        since: dict[H11Protocol, tuple[tuple[Any, ...], float]] = {}
        for connection in self._all():
            phase = phase_of(connection)
            unread = connection.transport.get_write_buffer_size() if phase == "answer" else 0
            state = phase, connection.cycle, unread
            known, begun = self._since.get(connection, (None, now))
            since[connection] = state, begun if known == state else now
            if phase != "work" and now - since[connection][1] > self._patience[phase]:
                connection.transport.abort()
                self._note(phase)
        self._since = since

    def _make_room(self) -> bool:
        """Closes the connection that has waited longest without a whole request; False if there is none."""
        while self._closable and not is_waiting(self._closable[-1]):
            self._closable.pop()  # it has gone, or sent its request since

        now = monotonic()
        if not self._closable and now - self._searched > SEARCH_S:
            self._searched = now
            waiting = [c for c in self._all() if is_waiting(c)]
            age = {c: now - self._since[c][1] if c in self._since else 0.0 for c in waiting}
            self._closable = sorted(waiting, key=age.__getitem__)

        if self._closable:
            self._closable.pop().transport.abort()
            self._note("room")
            return True
        return False

    def _note(self, reason: Reason) -> None:
        self._closed[reason] += 1
        self._count(reason)

    def _report(self) -> None:
        """Logs what was closed since the last line, unless that was a moment ago; idle connections are no news."""
        del self._closed["idle"]
        if not self._closed or monotonic() - self._reported < REPORT_S:
            return
        self._reported = monotonic()
        told = ", ".join(f"{number} {TOLD[reason]}" for reason, number in self._closed.items())
        logger.warning("connections closed: %s; %d are open (%s)", told, self.open, BOUNDS)
        self._closed.clear()


TOLD: dict[Reason, str] = {
    "head": "without a whole head",
    "body": "without a whole body",
    "answer": "that did not read their answer",
    "room": "to make room for newer ones",
    "refused": "for want of room",
}


def first_reserved(limit: int) -> int:
    """The first descriptor that no connection may have; the kernel gives the lowest that is free."""
    return max(limit - RESERVED, limit // 2) if limit != resource.RLIM_INFINITY else 2**31


def phase_of(connection: H11Protocol) -> Phase:
    """What a connection is waiting for: a client's head, body, reading, next request; or the server's work."""
    if connection.flow.write_paused:
        return "answer"
    if connection.cycle is None:
        return "head"
    if connection.cycle.response_complete:
        return "idle"
    return "body" if connection.cycle.more_body else "work"


def is_waiting(connection: H11Protocol) -> bool:
    """Whether a connection has no whole request, and no rest of an answer, that would be lost with it."""
    transport = connection.transport
    return (
        phase_of(connection) in ("head", "body", "idle")
        and not transport.is_closing()
        and not transport.get_write_buffer_size()
    )


class Listener(socket.socket):
    """A listening socket that closes connections for which there is no room, before anything is made of them.

    Attributes:
        connections: those of the server that listens here; set before it accepts any.
    """

    connections: Connections

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises:
            BlockingIOError: there is none that may stay.
        """
        accepted, address = super().accept()
        if not self.connections.admits(accepted.fileno()):
            accepted.close()
            raise BlockingIOError("no room for the connection")
        return Accepted(accepted.detach(), self.connections), address


class Accepted(socket.socket):
    """The socket of a connection, which is counted until it is closed."""

    def __init__(self, descriptor: int, connections: Connections) -> None:
        super().__init__(fileno=descriptor)
        self._connections = connections
        connections.opened()

    def close(self) -> None:
        if self.fileno() != -1:
            self._connections.closed()
        super().close()

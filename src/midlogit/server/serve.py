"""Runs a server: binds, loads, serves, stops when told to or when its engine has died; knows uvicorn, no route."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import sys
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from midlogit.engines.stepping import freeze_heap
from midlogit.errors import EngineFailure, MidlogitError
from midlogit.pair import Pair
from midlogit.server import logs
from midlogit.server.app import build_app
from midlogit.server.connections import BACKLOG, Connections, Listener
from midlogit.server.logs import logger
from midlogit.server.service import Service
from midlogit.server.settings import ServerSettings

FAREWELL_S = 1.0  # seconds that /health tells of a dead engine before the server stops
SWITCH_S = 5e-4  # seconds after which a busy thread of Python lets the engine go on
LINGER_S = 5.0  # seconds that the last answers have to reach their clients


class AddressUnavailable(MidlogitError, OSError):
    """The server cannot listen on an address."""


def serve(settings: ServerSettings, open_pair: Callable[[], Pair]) -> None:
    """Serves until it is told to stop; `open_pair` runs while the server already answers that it is loading.

    Raises:
        AddressUnavailable: it cannot listen on the address; nothing was loaded.
        MidlogitError: the pair cannot be opened.
        EngineFailure: the engine has died; what ran was answered.
        KeyboardInterrupt: stopped by Ctrl-C, after running requests had finished.
    """
    listener = listen(settings.host, settings.port)
    where = url_of(settings.host, listener.getsockname()[1])
    service = Service(settings)
    logs.set_up(settings.json_logs, service.redact)
    sys.setswitchinterval(SWITCH_S)
    failures: list[Exception] = []

    def load() -> None:
        try:
            service.open(open_pair())
            freeze_heap()  # the server's own libraries too
            logger.info("ready: %s", where)
        except Exception as error:  # raised again below, by the thread that waits for the server
            failures.append(error)
            server.should_exit = True

    server = Server(service, build_app(service, load), listener)
    if not settings.is_local and not settings.api_keys:
        logger.warning(
            "anyone who can reach %s can use this server: give it an --api-key", settings.host
        )
    logger.info("loading; listening on %s", where)
    try:
        server.run()
    finally:
        service.close()
    if failures:
        raise failures[0]
    if service.failure is not None:
        raise EngineFailure(f"{service.failure.rstrip('.')}.", "Start the server again.")


def url_of(host: str, port: int) -> str:
    """The URL of the address that the server listens on; if that is every address, the loopback one."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # by wildcard address, the loopback address
    reached = everywhere.get(host, host)
    url = f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
    return f"{url} (and every other address of this machine)" if host in everywhere else url


def listen(host: str, port: int) -> Listener:
    """A listening socket.

    Raises:
        AddressUnavailable: the port is taken, or the host is not one of this machine.
    """
    listener: Listener | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listener = Listener(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise AddressUnavailable(
            f"Cannot listen on {where}: {_reason(error)}.", "Choose another."
        ) from error
    return listener


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return "the host is no name or address"
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror)


class Server(uvicorn.Server):
    """A uvicorn server whose connections are bounded, and that gives running completions time to finish.

    Its loop and its parser are the ones named here, whatever else is installed: connections are counted as asyncio
    accepts them, and h11 bounds the head of a request.
    """

    def __init__(self, service: Service, app: ASGIApp, listener: Listener) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=math.ceil(settings.patience.idle_s),
            )
        )
        self._service = service
        self._listener = listener
        self._connections = listener.connections = Connections(
            settings.max_connections, settings.patience, service.metrics.connection_closed
        )
        self._connections.watch(self.server_state)
        service.metrics.count_connections(lambda: self._connections.open)
        self._farewell: float | None = None  # when the engine was found dead
        self._unfinished = 0

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets=[self._listener])

    async def main_loop(self) -> None:
        keeping = asyncio.create_task(self._connections.keep())
        await super().main_loop()
        keeping.cancel()

    async def on_tick(self, counter: int) -> bool:
        """Stops the server once the engine has died; runs ten times a second."""
        failure = self._service.failure
        if failure is not None and self._farewell is None:
            logger.error("stopping: %s", failure)
            self._farewell = time.monotonic()
        if self._farewell is not None and time.monotonic() - self._farewell > FAREWELL_S:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        service = self._service
        service.stop()
        begun = service.gate.running + service.gate.waiting
        grace = service.settings.grace_s if service.failure is None else LINGER_S
        if begun and service.failure is None:
            logger.info("stopping: %d completions have up to %g s to finish", begun, grace)
        deadline = asyncio.create_task(self._end_after(grace))
        await super().shutdown(sockets)
        deadline.cancel()
        left = self._unfinished
        logger.info("stopped: %d finished, %d ended early", begun - left, left)

    async def _end_after(self, seconds: float) -> None:
        """Aborts what still runs after a time, and then closes connections that do not read their answers."""
        await asyncio.sleep(seconds)
        self._unfinished = self._service.gate.running + self._service.gate.waiting
        await asyncio.get_running_loop().run_in_executor(None, self._service.close)
        await asyncio.sleep(LINGER_S)
        self._connections.close()

"""Runs a server: binds, loads, serves, stops; knows uvicorn, no route."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

import uvicorn

from midlogit.errors import MidlogitError
from midlogit.pair import Pair
from midlogit.server import logs
from midlogit.server.app import build_app
from midlogit.server.logs import logger
from midlogit.server.service import Service
from midlogit.server.settings import ServerSettings

KEEP_ALIVE_S = 75  # longer than most proxies and clients keep an idle connection
BACKLOG = 2048  # connections that wait to be accepted


class AddressUnavailable(MidlogitError, OSError):
    """The server cannot listen on an address."""


def serve(settings: ServerSettings, open_pair: Callable[[], Pair]) -> None:
    """Serves until it is told to stop; `open_pair` runs while the server already answers that it is loading.

    Raises:
        AddressUnavailable: it cannot listen on the address; nothing was loaded.
        MidlogitError: the pair cannot be opened.
        KeyboardInterrupt: stopped by Ctrl-C, after running requests had finished.
    """
    listener = listen(settings.host, settings.port)
    where = url_of(settings.host, listener.getsockname()[1])
    service = Service(settings)
    logs.set_up(settings.json_logs, service.redact)
    failures: list[Exception] = []

    def load() -> None:
        try:
            service.open(open_pair())
            logger.info("ready: %s", where)
        except Exception as error:  # raised again below, by the thread that waits for the server
            failures.append(error)
            server.should_exit = True

    server = Server(service, uvicorn.Config(
        build_app(service, load),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    ))  # fmt: skip

    if not settings.is_local and not settings.api_keys:
        logger.warning(
            "anyone who can reach %s can use this server: give it an --api-key", settings.host
        )
    logger.info("loading; listening on %s", where)
    try:
        server.run(sockets=[listener])
    finally:
        service.close()
    if failures:
        raise failures[0]


def url_of(host: str, port: int) -> str:
    """The URL of the address that the server listens on; if that is every address, the loopback one."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # by wildcard address, the loopback address
    reached = everywhere.get(host, host)
    url = f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
    return f"{url} (and every other address of this machine)" if host in everywhere else url


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        AddressUnavailable: the port is taken, or the host is not one of this machine.
    """
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
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
    """A uvicorn server that gives running completions time to finish, and logs how many did."""

    def __init__(self, service: Service, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        service = self._service
        service.stop()
        begun = service.gate.running + service.gate.waiting
        grace = service.settings.grace_s
        if begun:
            logger.info("stopping: %d completions have up to %g s to finish", begun, grace)
        deadline = asyncio.create_task(self._abort_after(grace))
        await super().shutdown(sockets)
        deadline.cancel()
        left = deadline.result() if deadline.done() and not deadline.cancelled() else 0
        logger.info("stopped: %d finished, %d ended early", begun - left, left)

    async def _abort_after(self, seconds: float) -> int:
        """Aborts what still runs after a time; returns how many completions that were."""
        await asyncio.sleep(seconds)
        left = self._service.gate.running + self._service.gate.waiting
        await asyncio.get_running_loop().run_in_executor(None, self._service.close)
        return left

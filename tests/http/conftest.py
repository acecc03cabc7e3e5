"""Two servers of the bundled pair for the whole session; MIDLOGIT_TEST_SERVERS=BASE,TEACHER uses running ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from midlogit.pair import bundled
from tests.http.proxy import Proxy
from tests.http.servers import Server

WHOLE = 4096  # ids of the bundled pair
FLAGS = ("--enforce-eager", "--max-model-len", "512", "--max-logprobs", str(WHOLE))


@dataclass(frozen=True)
class Urls:
    base: str
    teacher: str


@pytest.fixture(scope="session")
def urls() -> Iterator[Urls]:
    given = os.environ.get("MIDLOGIT_TEST_SERVERS")
    if given:
        yield Urls(*given.split(","))
        return
    servers = [Server(bundled(side), *FLAGS) for side in ("base", "teacher")]
    try:
        for server in servers:
            server.wait()
        yield Urls(servers[0].url, servers[1].url)
    finally:
        for server in servers:
            server.stop()


@pytest.fixture
def proxies(urls: Urls) -> Iterator[tuple[Proxy, Proxy]]:
    """A proxy before each server, without faults until told."""
    with Proxy(urls.base) as base, Proxy(urls.teacher) as teacher:
        yield base, teacher

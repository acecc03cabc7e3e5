"""A server that anyone may reach: crowds, clients that vanish, wait or flood, and requests that ask for too much.

`make test-load`; beside each kind, small requests are sent all the time, and the slowest of them is what counts. One
real process takes everything in turn, so that what a kind leaves behind is seen by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.questions import QUESTIONS
from tests.server.conftest import process
from tests.server.test_connections import HEAD, cpu_seconds

PATIENCE_S = float(os.environ.get("MIDLOGIT_LOAD_SECONDS", "1"))  # for a small request
DESCRIPTORS = 1024
FOR_A_WHILE_S = 8.0  # seconds that clients wait, trickle or flood
GROWTH_MIB = 100.0  # of the process's memory, over all kinds together
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

Kind = Callable[["Process", aiohttp.ClientSession], Awaitable[Counter[int]]]


@dataclass
class Process:
    """A server in a process of its own, and what its log says.

    Attributes:
        log: its lines so far.
    """

    url: str
    port: int
    process_id: int
    log: list[str] = field(default_factory=list)

    @property
    def memory_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process_id}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process_id}/fd").iterdir()))

    async def sockets(self, number: int, sent: bytes) -> list[tuple[asyncio.StreamReader, Any]]:
        """Connections on which something has been sent; those that the server closes at once are left out."""
        opened = []
        for _ in range(number):
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(sent)
                opened.append((reader, writer))
        return opened


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with process(descriptors=DESCRIPTORS) as (child, http):
        port = http.base_url.port
        assert port is not None and child.stderr is not None
        found = Process(f"http://127.0.0.1:{port}", port, child.pid)
        reading = threading.Thread(target=lambda: found.log.extend(child.stderr or ()))
        reading.start()
        asyncio.run(warm_up(found))
        yield found
        child.terminate()
        reading.join()


async def warm_up(server: Process) -> None:
    """What a server of some age has done: filled its caches, grown its heap."""
    async with session(server) as client:
        await crowd(server, client, 64)
        await multiplied(server, client, seconds=2.0)


@contextlib.asynccontextmanager
async def session(server: Process) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(300)
    async with aiohttp.ClientSession(server.url, connector=connector, timeout=timeout) as client:
        yield client


async def crowd(server: Process, client: aiohttp.ClientSession, number: int = 600) -> Counter[int]:
    """Everybody at once."""

    async def one(index: int) -> int:
        body = {"prompt": QUESTIONS[index % len(QUESTIONS)], "max_tokens": 4, "seed": index}
        async with client.post("/v1/completions", json=body) as response:
            await response.read()
            return response.status

    return Counter(await asyncio.gather(*(one(index) for index in range(number))))


async def soak(server: Process, client: aiohttp.ClientSession) -> Counter[int]:
    """Streams, eight at a time; every fourth client vanishes in the middle."""
    free = asyncio.Semaphore(8)

    async def one(index: int) -> int:
        body = {
            "messages": [{"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]}],
            "max_tokens": 24,
            "seed": index,
            "stream": True,
        }
        async with free, client.post("/v1/chat/completions", json=body) as response:
            events, last = 0, b""
            async for line in response.content:
                events += line.startswith(b"data: ")
                if index % 4 == 0 and events == 3:
                    return response.status
                last = line.strip() or last
            assert last == b"data: [DONE]"
            return response.status

    return Counter(await asyncio.gather(*(one(index) for index in range(240))))


async def slow_heads(server: Process, client: aiohttp.ClientSession) -> Counter[int]:
    return await trickle(server, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")


async def slow_bodies(server: Process, client: aiohttp.ClientSession) -> Counter[int]:
    return await trickle(server, HEAD + b"Content-Length: 1000\r\n\r\n{")


async def trickle(server: Process, begun: bytes) -> Counter[int]:
    """Three hundred requests that go on, byte by byte, and never end."""
    opened = await server.sockets(300, begun)
    deadline = time.monotonic() + FOR_A_WHILE_S
    while time.monotonic() < deadline:
        for _, writer in opened:
            writer.write(b"x")
        await asyncio.sleep(0.5)
    for _, writer in opened:
        writer.close()
    return Counter()


async def slow_readers(server: Process, client: aiohttp.ClientSession) -> Counter[int]:
    """Streams larger than the kernel's buffers, of which nobody reads anything; half the seats stay free."""
    body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": 20}
    data = json.dumps({**body, "midlogit": {"diagnostics": True}}).encode()
    opened = []
    for _ in range(8):
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        opened.append(slow)
    await asyncio.sleep(2 * FOR_A_WHILE_S)
    for slow in opened:
        slow.close()
    return Counter()


async def flood(server: Process, client: aiohttp.ClientSession) -> Counter[int]:
    """More half-sent requests than the server may open descriptors, again and again."""
    before, begun = cpu_seconds(server.process_id), time.monotonic()
    opened = []
    while time.monotonic() < begun + FOR_A_WHILE_S:
        opened += await server.sockets(DESCRIPTORS, HEAD)
        await asyncio.sleep(2)
    share = (cpu_seconds(server.process_id) - before) / (time.monotonic() - begun)
    print(f"  {len(opened)} connections, {share:.0%} of a core")
    for _, writer in opened:
        writer.close()
    assert server.descriptors < DESCRIPTORS
    return Counter()


async def multiplied(
    server: Process, client: aiohttp.ClientSession, seconds: float = FOR_A_WHILE_S
) -> Counter[int]:
    """Requests that ask for much with little, and large ones, by eight clients."""
    text = "All happy families are alike. " * 20_000
    ids = [7] * 400_000
    message = {"role": "user", "content": "a"}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": ["a"] * 2_000, "n": 128}),
        ("/v1/completions", {"prompt": ["a"] * 10_000}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": [ids]}),
        ("/v1/completions", {"prompt": "a", "n": 10**9}),
        ("/v1/completions", {"prompt": "a", "stop": [text[:50_000]] * 4}),
        ("/v1/completions", {"prompt": ["a" * 900] * 200, "max_tokens": 0, "echo": True}),
        ("/v1/chat/completions", {"messages": [message] * 20_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/tokenize", {"prompt": text * 10}),
        ("/detokenize", {"tokens": ids}),
        ("/tokenize", {"prompt": "a" * 9 * 2**20}),
    ]
    encoded = [(path, json.dumps(body).encode()) for path, body in bodies]
    deadline = time.monotonic() + seconds
    found: Counter[int] = Counter()

    async def one(index: int) -> None:
        while time.monotonic() < deadline:
            path, data = encoded[index % len(encoded)]
            headers = {"Content-Type": "application/json"}
            async with client.post(path, data=BytesIO(data), headers=headers) as response:
                await response.read()
                found[response.status] += 1
            index += 5

    await asyncio.gather(*(one(index) for index in range(8)))
    return found


KINDS: list[
    tuple[Kind, bool]
] = [  # with completions beside them, or /health alone where all seats are taken
    (soak, True),
    (slow_heads, True),
    (slow_bodies, True),
    (slow_readers, True),
    (flood, True),
    (multiplied, True),
    (crowd, False),
]


@pytest.mark.parametrize(("kind", "completes"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
def test_small_requests_are_answered(server: Process, kind: Kind, completes: bool) -> None:
    slowest, failures, sent, refused = 0.0, Counter[str](), 0, 0
    ended = threading.Event()

    def small(path: str) -> bytes:
        """One request on a connection of its own, in a thread of its own: the event loop is busy with the others."""
        body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
        request = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as opened:
            opened.sendall(request if path == "/v1/completions" else HEALTH)
            return opened.recv(1000).split(b"\r\n")[0]

    def send_small() -> None:
        nonlocal slowest, sent, refused
        while not ended.is_set():
            for path in ("/health", "/v1/completions") if completes else ("/health",):
                begun = time.monotonic()
                answer = b""
                while not answer and time.monotonic() < begun + 60:
                    try:
                        answer = small(path)
                    except ConnectionResetError:
                        refused += 1  # no room: a client tries again
                        time.sleep(0.05)
                slowest = max(slowest, time.monotonic() - begun)
                sent += 1
                if answer != b"HTTP/1.1 200 OK":
                    failures[f"{path}: {answer.decode()}"] += 1
            time.sleep(0.05)

    async def run() -> Counter[int]:
        async with session(server) as client:
            return await kind(server, client)

    prober = threading.Thread(target=send_small)
    prober.start()
    try:
        statuses = asyncio.run(run())
    finally:
        ended.set()
        prober.join()
    print(
        f"{kind.__name__}: {dict(statuses)}; {sent} small requests, {refused} of them refused once, "
        f"the slowest {slowest:.2f} s; "
        f"{server.memory_mib:.0f} MiB, {server.descriptors} descriptors"
    )
    assert not [status for status in statuses if status >= 500 and status != 503]
    assert slowest < PATIENCE_S
    assert not failures
    assert not refused or kind is flood


def test_nothing_is_left_behind(server: Process) -> None:
    """After all kinds twice, memory and descriptors are what they were after once."""

    async def again() -> None:
        async with session(server) as client:
            for kind, _ in KINDS:
                await kind(server, client)

    memory = server.memory_mib
    settle(server)
    descriptors = server.descriptors
    asyncio.run(again())
    settle(server)
    print(
        f"{memory:.0f} MiB, then {server.memory_mib:.0f}; {descriptors} descriptors, then {server.descriptors}"
    )
    assert server.memory_mib < memory + GROWTH_MIB
    assert server.descriptors <= descriptors + 2
    assert not [line for line in server.log if " error " in line or "Traceback" in line]
    told = [line for line in server.log if "connections closed" in line]
    assert 0 < len(told) < 40
    print(*told, sep="")


def settle(server: Process) -> None:
    """Waits until nothing runs and no connection is open but the one that asks."""
    deadline = time.monotonic() + 90
    while True:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as opened:
            opened.sendall(HEALTH.replace(b"/health", b"/metrics"))
            text = b"".join(iter(lambda: opened.recv(2**16), b"")).decode()
        lines = dict(
            line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("midlogit:num")
        )
        numbers = {name.partition(":")[2]: float(value) for name, value in lines.items()}
        if numbers == {"num_requests_running": 0, "num_requests_waiting": 0, "num_connections": 1}:
            return
        assert time.monotonic() < deadline, numbers
        time.sleep(0.2)

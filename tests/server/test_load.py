"""Many clients at once: no mix-up, no row left behind, and no slow reader in the others' way."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from midlogit.requests.sequence import Sequence
from tests.questions import QUESTIONS
from tests.server.conftest import Live, bundled_pair, run_server

CLIENTS = 64


@pytest.fixture(scope="module")
def wide() -> Iterator[Live]:
    """A server whose batch is smaller than the crowd, so that requests also wait and join."""
    with run_server(lambda: bundled_pair(32), max_num_seqs=32) as live:
        yield live


def body_of(number: int, tokens: int = 20) -> dict[str, Any]:
    """A request unlike the others: its own prompt, seed and parameters."""
    return {
        "messages": [{"role": "user", "content": f"{QUESTIONS[number % len(QUESTIONS)]} {number}"}],
        "seed": number,
        "max_completion_tokens": tokens - number % 5,
        "temperature": (0.0, 0.7, 1.0, 1.3)[number % 4],
        "midlogit": {"preset": ("balanced", "exploratory", "conservative")[number % 3]},
    }


async def read(
    client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None = None
) -> str:
    """The text of a stream; leaves in the middle when told to."""
    text, seen = "", 0
    async with client.stream(
        "POST", "/v1/chat/completions", json={**body, "stream": True}
    ) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            text += choice["delta"].get("content", "")
            seen += 1
            if leave_after is not None and seen > leave_after:
                return text
    return text


def test_64_streaming_clients(wide: Live) -> None:
    async def crowd() -> list[str]:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=wide.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(
                *(read(client, body_of(number)) for number in range(CLIENTS))
            )

    together = asyncio.run(crowd())
    wide.wait_idle()
    for number, text in enumerate(together):
        alone = wide.post("/v1/chat/completions", body_of(number)).json()["choices"][0]["message"][
            "content"
        ]
        assert text == alone, number


def test_disconnecting_clients_leave_no_row_behind(wide: Live) -> None:
    leaving = set(range(0, CLIENTS, 5))
    aborted: list[tuple[Sequence, int]] = []
    engine = wide.pair.engine
    abort = engine.abort

    def watch(sequences: list[Sequence]) -> None:
        aborted.extend((sequence, len(sequence.token_ids)) for sequence in sequences)
        abort(sequences)

    async def crowd() -> list[str]:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=wide.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(
                *(
                    read(
                        client,
                        {**body_of(number), "max_completion_tokens": 900, "min_tokens": 400},
                        leave_after=3,
                    )
                    if number in leaving
                    else read(client, body_of(number))
                    for number in range(CLIENTS)
                )
            )

    engine.abort = watch  # type: ignore[method-assign]
    try:
        texts = asyncio.run(crowd())
        wide.wait_idle()
    finally:
        del engine.abort  # type: ignore[method-assign]
    assert all(texts[number] for number in range(CLIENTS) if number not in leaving)
    assert len(aborted) == len(leaving)
    # The step under way when the server heard of it may still draw its tokens, one and its drafts; none follows.
    most = 1 + max(engine.draft_length.choices)
    assert all(len(sequence.token_ids) <= drawn + most for sequence, drawn in aborted)
    assert wide.service.gate.running == wide.service.gate.waiting == 0


def test_leaving_an_unstreamed_request_frees_its_row(wide: Live) -> None:
    body = {"prompt": ["a"] * 4, "max_tokens": 1000, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        wide.post("/v1/completions", body, timeout=0.5)
    begun = time.monotonic()
    wide.wait_idle(3)
    assert time.monotonic() - begun < 3


def test_leaving_while_being_scored(wide: Live) -> None:
    body = {"prompt": [[7] * 900] * 40, "max_tokens": 0, "echo": True, "logprobs": 1}
    with pytest.raises(httpx.ReadTimeout):
        wide.post("/v1/completions", body, timeout=0.3)
    wide.wait_idle(20)
    assert wide.complete("a", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_a_slow_reader_does_not_slow_the_others(wide: Live) -> None:
    body = {
        "prompt": "Once",
        "max_tokens": 700,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 20,
        "n": 8,
    }
    body["midlogit"] = {"diagnostics": True}  # far more bytes than the sockets hold
    data = json.dumps(body).encode()
    host, port = wide.url.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}"
        )
        slow.sendall(head.encode() + b"\r\n\r\n" + data)
        slow.recv(100)  # and reads no more
        for number in range(3):
            assert wide.post("/v1/chat/completions", body_of(number), timeout=30).status_code == 200
    wide.wait_idle(20)


def test_requests_join_the_running_batch(wide: Live) -> None:
    """A short request ends while a long one that came before it still runs."""
    with wide.http.stream(
        "POST",
        "/v1/completions",
        json={"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True},
    ) as long:
        lines = long.iter_lines()
        next(lines)
        short = wide.complete("b", max_tokens=5, ignore_eos=True)
        assert short["usage"]["completion_tokens"] == 5
        assert wide.service.gate.running == 1
    wide.wait_idle()

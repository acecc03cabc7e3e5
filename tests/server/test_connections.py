"""Clients that keep the server waiting: half requests, unread answers, more connections than there is room for."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from midlogit.server.settings import Patience
from tests.server.conftest import Live, bundled_pair, events, process, run_server

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
STREAM = {"prompt": "Once", "max_tokens": 150, "ignore_eos": True, "stream": True}
ROOM = 6


@pytest.fixture(scope="module")
def brief() -> Iterator[Live]:
    """A server of little patience, with room for a few connections and as many completions."""
    patience = Patience(head_s=0.5, body_s=0.5, answer_s=0.5, idle_s=2.5)
    with run_server(
        lambda: bundled_pair(ROOM),
        send_buffer=4096,
        patience=patience,
        max_connections=ROOM,
        max_num_seqs=ROOM,
        max_queued=0,
    ) as live:
        yield live


def connect(url: str, sent: bytes = b"") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    opened = socket.create_connection((host, int(port)), timeout=30)
    opened.sendall(sent)
    return opened


def request_of(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data


def answer_of(url: str, path: str = "/health") -> bytes:
    """The status line on a connection of its own."""
    with connect(url, b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode()) as opened:
        return opened.recv(1000).split(b"\r\n")[0]


def ends(opened: socket.socket) -> bool:
    """Reads until the server closes the connection."""
    with contextlib.suppress(ConnectionResetError):
        while opened.recv(2**16):
            pass
    return True


def closed(live: Live, reason: str) -> float:
    name = f'midlogit:connections_closed_total{{reason="{reason}"}} '
    lines = live.service.metrics.exposition().decode().splitlines()
    return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), 0.0)


def test_half_requests_and_idle_connections_are_closed(brief: Live) -> None:
    whole_later = connect(brief.url, HEAD)
    waiting = [
        connect(brief.url, HEAD[:30]),
        connect(brief.url, b""),
        connect(brief.url, HEAD + b"Content-Length: 1000\r\n\r\n{"),
        connect(brief.url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    ]
    whole_later.sendall(request_of({"prompt": "a", "max_tokens": 1})[len(HEAD) :])
    assert whole_later.recv(1000).startswith(b"HTTP/1.1 200")
    assert all(ends(opened) for opened in waiting)
    assert closed(brief, "head") >= 2 and closed(brief, "body") >= 1
    for opened in (whole_later, *waiting):
        opened.close()


def test_a_trickle_is_no_request(brief: Live) -> None:
    for begun in (b"", HEAD + b"Content-Length: 1000\r\n\r\n"):
        with connect(brief.url, begun) as slow, pytest.raises(OSError):
            for _ in range(300):
                slow.sendall(b"x")
                time.sleep(0.1)


def test_an_answer_that_nobody_reads_frees_its_rows(brief: Live) -> None:
    body = {**STREAM, "n": ROOM, "logprobs": 20}
    host, port = brief.url.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.sendall(request_of(body))
        slow.recv(100)  # and reads no more
        assert brief.post("/v1/completions", {"prompt": "a"}).status_code == 429
        deadline = time.monotonic() + 60
        while brief.service.gate.running:
            assert time.monotonic() < deadline, "rows left behind"
            time.sleep(0.05)
    assert closed(brief, "answer") == 1
    assert brief.complete("a", max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2


def test_newer_connections_take_the_place_of_waiting_ones(brief: Live) -> None:
    begun = closed(brief, "room")
    with brief.http.stream("POST", "/v1/completions", json=STREAM) as response:
        lines = response.iter_lines()
        first = next(lines)
        waiting = [connect(brief.url, HEAD) for _ in range(ROOM)]
        for _ in range(ROOM):
            time.sleep(0.1)  # longer than between two searches
            assert answer_of(brief.url) == b"HTTP/1.1 200 OK"
        found = list(events(iter([first, *lines])))
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    assert closed(brief, "room") > begun
    assert all(ends(opened) for opened in waiting)
    for opened in waiting:
        opened.close()


def test_without_room_a_connection_is_closed_and_the_others_go_on(brief: Live) -> None:
    begun = closed(brief, "refused")
    running = []
    for _ in range(ROOM):
        running.append(connect(brief.url, request_of(STREAM)))
        assert running[-1].recv(12) == b"HTTP/1.1 200"
    with connect(brief.url) as late:
        assert ends(late)
    assert closed(brief, "refused") == begun + 1
    for opened in running:
        text = b""
        while b"[DONE]" not in text:
            text += opened.recv(2**16)
        assert b'"finish_reason":"length"' in text
        opened.close()


def test_more_connections_than_descriptors() -> None:
    with process(descriptors=128) as (child, http):
        url = str(http.base_url)
        flood = []
        with http.stream("POST", "/v1/completions", json=STREAM) as response:
            lines = response.iter_lines()
            first = next(lines)
            for _ in range(180):
                with contextlib.suppress(OSError):
                    flood.append(connect(url, HEAD))
            found = list(events(iter([first, *lines])))
        before = cpu_seconds(child.pid)
        for _ in range(10):
            assert answer_of(url) == b"HTTP/1.1 200 OK"
            time.sleep(0.15)
        assert (
            cpu_seconds(child.pid) - before < 0.75
        )  # of 1.5: a loop of failing calls would take it all
        assert len(list(Path(f"/proc/{child.pid}/fd").iterdir())) < 128
        child.terminate()
        _, log = child.communicate(timeout=60)
        for opened in flood:
            opened.close()
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    told = [line for line in log.splitlines() if "connections closed" in line]
    assert 1 <= len(told) <= 1 + 60 // 10 and len(log) < 10_000


def cpu_seconds(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100

"""A real server over the bundled pair: uvicorn on a free port, in a thread, so that tests can also look inside."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import httpx
    import torch

import pytest

from midlogit import Pair
from midlogit.server.app import build_app
from midlogit.server.serve import Server, listen
from midlogit.server.service import Service
from midlogit.server.settings import ServerSettings

torch.set_num_threads(1)  # the server's own thread and the clients' take the other core


@dataclass
class Live:
    """A running server."""

    url: str
    service: Service
    pair: Pair
    http: httpx.Client

    def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        return self.http.post(path, json=body, **kwargs)

    def complete(self, prompt: Any = "Once upon a time", **fields: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", {"prompt": prompt, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, content: str = "Tell me a story.", **fields: Any) -> dict[str, Any]:
        response = self.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields}
        )
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, read by the rules of Server-Sent Events."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            return list(events(response.iter_lines()))

    @property
    def rows(self) -> int:
        """Sequences that the engine holds, waiting or running."""
        return self.pair.engine.num_live  # type: ignore[attr-defined]

    def wait_idle(self, seconds: float = 10) -> None:
        """Until the engine holds no row, or a failure."""
        deadline = time.monotonic() + seconds
        while self.rows or self.service.gate.running:
            assert time.monotonic() < deadline, f"{self.rows} rows left behind"
            time.sleep(0.01)


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """A plain reader of Server-Sent Events: `data:` lines, an empty line ends an event, [DONE] ends the stream."""
    data: list[str] = []
    done = False
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            assert not done, "nothing follows [DONE]"
            text = "\n".join(data)
            data = []
            if text == "[DONE]":
                done = True
            else:
                yield json.loads(text)
        else:
            assert not line, f"an unknown field: {line}"
    assert done, "the stream ends with [DONE]"


@contextlib.contextmanager
def run_server(
    open_pair: Callable[[], Pair], *, send_buffer: int | None = None, **settings: Any
) -> Iterator[Live]:
    """A server over the pair that `open_pair` gives, which it closes.

    Args:
        send_buffer: bytes of an answer that the kernel keeps; None for its own choice, which is megabytes.
    """
    chosen = ServerSettings(port=0, **settings)
    listener = listen(chosen.host, 0)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    service = Service(chosen)
    opened: list[Pair] = []

    def load() -> None:
        opened.append(open_pair())
        service.open(opened[0])

    server = Server(service, build_app(service, load), listener)
    thread = threading.Thread(target=server.run)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=120) as http:
        try:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if http.get("/health").status_code == 200:
                        break
                time.sleep(0.02)
            yield Live(url, service, opened[0], http)
        finally:
            http.close()
            server.should_exit = True
            thread.join()
            service.close()


COMMAND = "from midlogit.cli.main import run; run()"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(
    *arguments: str,
    code: str = COMMAND,
    python: str | Path = sys.executable,
    descriptors: int | None = None,
    **environment: str,
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """`midlogit serve` on a free port, ready to serve.

    Args:
        code: what Python runs; it must end in `COMMAND`. python: of another environment.
        descriptors: most that the process may open.
    """
    port = free_port()

    def limit() -> None:
        if descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    child = subprocess.Popen(
        [python, "-c", code, "serve", "--port", str(port), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=limit,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and child.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if http.get("/health").status_code == 200:
                        break
                time.sleep(0.1)
            yield child, http
    finally:
        child.kill()
        child.communicate()


def bundled_pair(max_num_seqs: int = 16) -> Pair:
    return Pair.local(dtype="float32", device="cpu", max_num_seqs=max_num_seqs)


@pytest.fixture(scope="session")
def server() -> Iterator[Live]:
    with run_server(bundled_pair) as live:
        yield live
        live.wait_idle()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder below which a server for trainers loads weights."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def live(root: Path) -> Iterator[Live]:
    """A server for trainers."""
    settings: dict[str, Any] = {"train": True, "preset": "rollout", "max_queued": None}
    with run_server(lambda: bundled_pair(8), weights_root=root, max_num_seqs=8, **settings) as live:
        yield live
        live.wait_idle()

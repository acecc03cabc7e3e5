"""A small HTTP proxy before a real server that breaks what it is told to break."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from tests.http.damage import DAMAGE

JSON = "application/json"
ROWS = ("/completions", "/inference/v1/generate")  # paths of calls for rows
Rewrite = Callable[[str, Any], Any]


def from_elsewhere(path: str, answer: Any) -> Any:
    """The answer of a server whose model folder is not on this machine, for `Proxy.rewrite_answer`."""
    if path.endswith("/models"):
        for card in answer["data"]:
            card["root"] = "/elsewhere"
    return answer


class Proxy:
    """Forwards to `target`; each fault is a plain attribute, set while it runs.

    Attributes:
        fault: called with the number of the call for rows, from 0; returns the name of what to do with it:
            "" (nothing), "reset" (cut the connection in mid-body), "truncate" (half the JSON), a status such as
            "500", "hang" (no answer), "delay" (half a second late), "longer" or "shorter" (a Content-Length that is too
            long or too short), "text" (another Content-Type), "swap" (the answer before in place of this one), "twice"
            (the answer before once more, after this one), a name of DAMAGE.
        dead: connections are accepted and cut at once.
        max_logprobs: as if the server had been started with this --max-logprobs.
        authorize: whether to let an Authorization header through.
        refuse: whether to answer the body of a call for rows with a 400.
        scales_out: whether the server is one that has been started with --enable-scale-out.
        rewrite_request, rewrite_answer: (path, JSON) to JSON.
        calls, rows: how many calls for rows and prompts in them there were.
        verifications: how many of the calls were for rows along one sequence.
    """

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self.fault: Callable[[int], str] = lambda call: ""
        self.dead = False
        self.max_logprobs: int | None = None
        self.authorize: Callable[[str], bool] = lambda key: True
        self.refuse: Callable[[Any], bool] = lambda body: False
        self.rewrite_request: Rewrite = lambda path, body: body
        self.rewrite_answer: Rewrite = lambda path, body: body
        self.scales_out = True
        self.calls = 0
        self.rows = 0
        self.verifications = 0
        self._previous = b"{}"
        self._lock = threading.Lock()
        self._closing = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.handle(self)

            def do_POST(self) -> None:
                proxy.handle(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}{self._target.path}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def stop_for(self, seconds: float) -> None:
        """Dead from now on for so long."""
        self.dead = True
        threading.Timer(seconds, lambda: setattr(self, "dead", False)).start()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if self.dead:
            self._cut(handler)
            return
        if not self.authorize(handler.headers.get("Authorization", "")):
            self._answer(handler, 401, b'{"error": "Unauthorized"}')
            return
        what = ""
        if handler.path.endswith(ROWS[1]) and not self.scales_out:
            self._answer(
                handler, 403, b'{"error": {"message": "Scale-out endpoints are disabled."}}'
            )
            return
        if handler.path.endswith(ROWS):
            with self._lock:
                number, self.calls = self.calls, self.calls + 1
                self.rows += len(json.loads(body).get("prompt", "1"))
                self.verifications += handler.path.endswith(ROWS[1])
            what = self.fault(number)
            asked = json.loads(body).get("logprobs") or 0
            if self.max_logprobs is not None and asked > self.max_logprobs:
                # The words of vLLM 0.32.
                reason = f"Requested sample logprobs of {asked}, which is greater than max allowed: {self.max_logprobs}"
                self._answer(handler, 400, json.dumps({"error": {"message": reason}}).encode())
                return
            if self.refuse(json.loads(body)):
                self._answer(handler, 400, b'{"error": {"message": "made to be refused"}}')
                return
        if what.isdigit():
            self._answer(handler, int(what), b'{"error": {"message": "made to fail"}}')
            return
        if what == "hang":
            self._closing.wait(60)
            self._cut(handler)
            return
        if what == "delay":
            time.sleep(0.5)
        status, content = self._forward(handler, body)
        if what == "reset":
            handler.wfile.write(
                f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content[:40]
            )
            handler.wfile.flush()
            self._cut(handler)
            return
        if status == 200 and handler.path.endswith(ROWS):
            self._answer_broken(handler, what, content)
        else:
            self._answer(handler, status, content)

    def _answer_broken(self, handler: BaseHTTPRequestHandler, what: str, content: bytes) -> None:
        """Answers with whole rows, unless told what to do with them."""
        with self._lock:
            previous, self._previous = self._previous, content
        if what in DAMAGE:
            content = json.dumps(DAMAGE[what](json.loads(content))).encode()
        if what == "truncate":
            content = content[: len(content) // 2]
        if what == "swap":
            content = previous
        length = len(content) + {"longer": 10, "shorter": -10}.get(what, 0)
        self._answer(handler, 200, content, "text/html" if what == "text" else JSON, length)
        if what == "longer":
            self._cut(handler)
        if what == "twice":
            handler.wfile.flush()
            time.sleep(0.005)
            self._answer(handler, 200, previous)

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        if body:
            body = json.dumps(self.rewrite_request(handler.path, json.loads(body))).encode()
        connection = HTTPConnection(str(self._target.hostname), self._target.port, timeout=60)
        try:
            headers = {
                "Content-Type": "application/json",
                "Authorization": handler.headers.get("Authorization", ""),
            }
            connection.request(handler.command, handler.path, body or None, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status == 200:
            content = json.dumps(self.rewrite_answer(handler.path, json.loads(content))).encode()
        return answer.status, content

    def _answer(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        kind: str = JSON,
        length: int | None = None,
    ) -> None:
        handler.send_response(status)
        if status == 429:
            handler.send_header("Retry-After", "0.2")
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)

    def _cut(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        with suppress(OSError):
            handler.connection.shutdown(SHUT_RDWR)

"""Who reaches a server: names that it is not called by, pages of browsers, and what errors tell of a request."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from midlogit.server.settings import ServerSettings
from tests.server.conftest import Live, bundled_pair, run_server
from tests.server.test_fuzz import BODIES, SOMETHING, WRONG, put

LONG = "x" * 5000
POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with run_server(
        bundled_pair, train=True, weights_root=tmp_path_factory.mktemp("weights")
    ) as live:
        yield live


def asked(server: Live, head: str) -> str:
    """The answer to a request of which every line of the head is given."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as plain:
        plain.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: plain.recv(65536), b"")).decode()


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/tokenize", "/nowhere"])
def test_another_sites_name_is_refused(server: Live, path: str) -> None:
    response = server.http.get(path, headers={"Host": "rebound.example:8000"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "unknown_host")


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1", "LOCALHOST.", "127.0.0.1", "127.1.2.3:80", "[::1]:8000"]
)
def test_names_of_this_machine(server: Live, host: str) -> None:
    assert server.http.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["", "[", "a b", "@localhost", "localhost.evil.example", "0"])
def test_odd_names(server: Live, host: str) -> None:
    assert asked(server, f"GET /health HTTP/1.1\r\nHost: {host}").startswith("HTTP/1.1 40")


@pytest.mark.parametrize(
    ("settings", "name", "is_called"),
    [
        ({}, "evil.example", False),
        ({"host": "localhost"}, "localhost", True),
        ({"host": "::1"}, "::1", True),
        ({"allowed_hosts": ("Box.example",)}, "box.example", True),
        ({"allowed_hosts": ("box.example",)}, "evil.example", False),
        ({"allowed_hosts": ("*",)}, "evil.example", True),
        ({"api_keys": ("key",)}, "evil.example", True),
        ({"host": "0.0.0.0"}, "box.example", True),
        ({"host": "0.0.0.0", "allowed_hosts": ("box.example",)}, "evil.example", False),
    ],
)
def test_which_names_are_checked(settings: dict[str, Any], name: str, is_called: bool) -> None:
    assert ServerSettings(**settings).is_called(name) == is_called


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/completions/", "/tokenize/", "//health"])
def test_nothing_is_redirected(server: Live, path: str) -> None:
    for method in ("GET", "POST"):
        answer = asked(server, f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0")
        assert answer.startswith("HTTP/1.1 404") and "location:" not in answer.lower()


@pytest.mark.parametrize("path", POSTS)
def test_errors_repeat_little_of_a_request(
    server: Live, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    fields = {*SOMETHING.get(path, {}), *WRONG, "model", "prompt", "tokens", LONG, "stop", "seed"}
    fields |= {"midlogit", f"midlogit.{LONG}", "midlogit.preset", "midlogit.alpha_rule"}
    fields |= {"midlogit.stop_id", "messages.0.role", f"messages.0.{LONG}", "stream", "n"}
    fields |= {f"chat_template_kwargs.{name}" for name in ("chat_template", "tokenize", LONG)}
    refused = 0
    with caplog.at_level(logging.INFO, "midlogit.server"):
        for field in sorted(fields):
            body = BODIES.get(path, {"tokens": [5], "messages": [{}]})
            if "messages" not in body and field.startswith("messages"):
                continue
            for value in (LONG, {LONG: LONG}, [LONG]):
                response = server.post(
                    path, put(body, field, value), headers={"X-Request-Id": LONG}
                )
                refused += response.status_code >= 400
                if response.status_code >= 400:
                    assert "x" * 201 not in response.text + str(response.headers), field
        for method, target in (("GET", f"/{LONG}"), ("GET", f"/v1/models/{LONG}"), (LONG, "/")):
            answer = asked(server, f"{method} {target} HTTP/1.1\r\nHost: localhost")
            assert "x" * 201 not in answer
        assert "x" * 201 not in asked(server, f"GET / HTTP/1.1\r\nHost: {LONG}.example")
    assert refused > 20
    assert all("x" * 201 not in record.getMessage() for record in caplog.records)


def test_secrets_in_what_is_repeated(server: Live) -> None:
    server.service.redact.hide("word-to-hide", "[hidden]")
    headers = {"X-Request-Id": "word-to-hide"}
    for body in ({"word-to-hide": 1}, {"model": "word-to-hide", "prompt": "a"}):
        response = server.post("/v1/completions", body, headers=headers)
        assert response.status_code in (400, 404)
        assert "word-to-hide" not in response.text + str(response.headers)
    answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=headers)
    assert answer.status_code == 200 and "word-to-hide" not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Host": "rebound.example"},
    ],
    ids=str,
)
def test_pages_and_forms_change_nothing(trainer: Live, headers: dict[str, str]) -> None:
    for path in ("/pause", "/resume", "/abort_requests", "/reset_prefix_cache", "/update_weights"):
        response = trainer.http.post(path, content=b"", headers=headers)
        assert response.status_code in (403, 415), (path, response.text)
        response = trainer.http.post(path, content=b'{"a":1}', headers=headers)
        assert response.status_code in (403, 415), (path, response.text)
    assert trainer.http.get("/is_paused").json() == {"is_paused": False}


def test_what_trainers_send_passes(trainer: Live) -> None:
    assert trainer.http.post("/reset_prefix_cache").status_code == 200
    assert trainer.post("/reset_prefix_cache", {}).status_code == 200
    assert trainer.post("/abort_requests", {}).status_code == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "MADE-UP"])
def test_other_verbs(server: Live, method: str) -> None:
    for path in ("/", "/v1/completions", "/tokenize"):
        answer = asked(server, f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://e.x")
        assert answer.startswith("HTTP/1.1 405") and "access-control" not in answer.lower()


def test_web_sockets_are_not_opened(server: Live) -> None:
    head = "GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    head += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as plain:
        plain.sendall(f"{head}\r\nConnection: Upgrade\r\n\r\n".encode())
        assert plain.recv(100).startswith(b"HTTP/1.1 40")

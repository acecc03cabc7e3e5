"""URLs as users write them: understood, or one line that says what was meant; no server of ours runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from midlogit import InvalidRequest, Pair
from midlogit.cli.loading import are_urls, split_urls
from midlogit.engines.http.client import endpoint
from midlogit.errors import ServerUnavailable


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("HTTP://127.0.0.1:9/v1", "http://127.0.0.1:9/v1"),
        (" http://127.0.0.1:9/v1// ", "http://127.0.0.1:9/v1"),
        ("https://user:p@ss@[::1]:9/v1", "https://user:p@ss@[::1]:9/v1"),
    ],
)
def test_urls_that_are_understood(given: str, url: str) -> None:
    assert endpoint("base", given, None).url == url
    assert "p@ss" not in endpoint("base", given, None).name


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("http://[::1/v1", "its host is no name or address"),
        ("http://u:secret@[::1/v1", "'http://[::1/v1' is not an http URL"),
        ("localhost:9000", "Did you mean http://localhost:9000/v1?"),
        ("127.0.0.1:9000/v1", "Did you mean http://127.0.0.1:9000/v1?"),
        ("[::1]:9000/", "Did you mean http://[::1]:9000/v1?"),
        ("http://h:99999/v1", "its port is no number from 0 to 65535"),
        ("http://h:x/v1", "its port is no number"),
        ("http://:9/v1", "it names no host"),
        ("http:/h:9/v1", "it names no host"),
        ("http://a..b/v1", "its host is no name"),
        ("http://a b/v1", "a blank or a control character"),
        ("http://h:9/v1?x=1", "it holds a query"),
        ("http://h:9/v1, http://h:8/v1", "a blank"),
        ("http://h:9/v1,http://h:8/v1", "Give a list of URLs"),
        ("ftp://h/v1", "does not begin with http://"),
        ("", "does not begin with http://"),
    ],
)
def test_urls_that_are_none_are_told_before_anything_is_asked(given: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Pair.http(given, "http://127.0.0.1:9/v1")
    assert "The base URL" in str(caught.value) and says in str(caught.value)
    assert "secret" not in str(caught.value)


def test_servers_on_the_command_line() -> None:
    for url in (
        "HTTP://h/v1",
        "https://h",
        "localhost:9000",
        "127.0.0.1",
        "[::1]:9000",
        "http://[::1/v1",
    ):
        assert are_urls(url, url)
    for name in ("./folder", "org/model", "folder", "/a:1/b"):
        assert not are_urls(name, name)
    assert split_urls("http://h:9/v1, http://h:8/v1,") == ["http://h:9/v1", "http://h:8/v1"]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """A server that knows /v1/models and nothing else; the URL of its root."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/v1/models" else 404)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *values: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ["", "/", "/v1/chat/completions", "/v1/models"])
def test_a_base_url_with_another_path_shows_what_was_asked_and_meant(
    elsewhere: str, path: str
) -> None:
    with pytest.raises(ServerUnavailable) as caught:
        Pair.http(elsewhere + path, elsewhere + path, max_retries=0)
    asked = f"{elsewhere}{path.rstrip('/')}/models"
    assert f"HTTP 404 to {asked}. Did you mean {elsewhere}/v1?" in str(caught.value)

"""Addresses as they are printed and refused, and paths that clients with another base URL ask for."""

from __future__ import annotations

import pytest

from midlogit.server.boundary import _meant
from midlogit.server.serve import AddressUnavailable, listen, url_of


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost:8000"),
        ("::1", "http://[::1]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000 (and every other address of this machine)"),
        ("::", "http://[::1]:8000 (and every other address of this machine)"),
    ],
)
def test_what_is_listened_on_is_a_url(host: str, url: str) -> None:
    assert url_of(host, 8000) == url


@pytest.mark.parametrize(
    ("host", "says"), [("2001:db8::1", r"on \[2001:db8::1\]:0: "), ("a..b", "no name or address")]
)
def test_what_cannot_be_listened_on_is_one_line(host: str, says: str) -> None:
    with pytest.raises(AddressUnavailable, match=says):
        listen(host, 0)


@pytest.mark.parametrize(
    "path", ["/chat/completions", "/v1/v1/chat/completions", "/api/chat/completions/"]
)
def test_a_path_of_another_base_url_says_what_was_meant(path: str) -> None:
    assert _meant(path).startswith("Did you mean /v1/chat/completions?")
    assert _meant("/v1/embeddings") == ""

"""URLs of servers as users write them: recognises them, says what is wrong, guesses the one meant; asks no server."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

SCHEME = re.compile(r"https?:/", re.IGNORECASE)
SEVERAL = re.compile(r",\s*https?://", re.IGNORECASE)
WITHOUT_SCHEME = re.compile(
    r"((localhost|[0-9.]{7,15})(:\d+)?|([\w.-]+|\[[0-9a-fA-F:.]+\]):\d+)(/.*)?$"
)


def looks_like_server(name: str) -> bool:
    """Whether a name means a server: a URL, also one without its scheme such as localhost:9000."""
    return SCHEME.match(name.strip()) is not None or WITHOUT_SCHEME.match(name.strip()) is not None


def what_is_wrong(url: str) -> str | None:
    """Why a text is not the URL of a server; None when it is one."""
    if any(c.isspace() or not c.isprintable() for c in url):
        return "it holds a blank or a control character"
    if SEVERAL.search(url):
        return "it holds several"

    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        host.encode("idna")
    except ValueError:
        return "its host is no name or address"
    try:
        _ = parts.port
    except ValueError:
        return "its port is no number from 0 to 65535"

    if parts.scheme not in ("http", "https"):
        return "it does not begin with http:// or https://"
    if not host:
        return "it names no host"
    if parts.query or parts.fragment:
        return "it holds a query"
    return None


def suggestion(url: str) -> str:
    """Advice for a text that is not the URL of a server."""
    if SEVERAL.search(url):
        return "Give a list of URLs; on the command line separate them with commas."
    if WITHOUT_SCHEME.match(url) and what_is_wrong(f"http://{url}") is None:
        path = "" if urlsplit(f"http://{url}").path.strip("/") else "/v1"
        return f"Did you mean http://{url.rstrip('/')}{path}?"
    return "Give one such as http://127.0.0.1:9000/v1"


def shown(url: str) -> str:
    """The URL without user and password."""
    return re.sub(r"^([a-zA-Z]+://)?\S*@", r"\1", url)

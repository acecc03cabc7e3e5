"""Plain calls of a vLLM server; knows nothing of midlogit's own client."""

from __future__ import annotations

import json
import urllib.request
from typing import Any


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    """The answer of a server.

    Args:
        url: of its API, which ends in /v1. path: from the root of the server.
    """
    request = urllib.request.Request(
        url.removesuffix("/v1") + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def model_of(url: str) -> str:
    """The name of the model that a server has."""
    with urllib.request.urlopen(f"{url}/models") as answer:
        return str(json.load(answer)["data"][0]["id"])

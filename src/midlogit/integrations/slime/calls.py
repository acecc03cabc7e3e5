"""Calls of a midlogit server from a trainer's event loop; knows HTTP and errors, no field of a body."""

from __future__ import annotations

import asyncio
import os
from typing import Any
from weakref import WeakKeyDictionary

from midlogit.errors import EngineFailure, InvalidRequest
from midlogit.extras import require

RETRIES, RETRY_S = 60, 1.0  # without a connection, as slime's own calls

_sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = WeakKeyDictionary()


async def post(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a body.

    Args:
        address: HOST:PORT, with http:// before it or not. The key of its server is in MIDLOGIT_API_KEY.

    Raises:
        InvalidRequest: the server refuses the body.
        EngineFailure: it fails, or cannot be reached.
    """
    aiohttp: Any = require("aiohttp", "http")
    url = (address if "://" in address else f"http://{address}").rstrip("/") + path
    for left in reversed(range(RETRIES)):
        try:
            async with _session().post(url, json=body) as response:
                answer = await response.json()
                status = response.status
            break
        except aiohttp.ClientConnectionError as error:
            if not left:
                raise EngineFailure(f"No midlogit server answers at {url}: {error}") from error
            await asyncio.sleep(RETRY_S)

    if status != 200:
        kind = InvalidRequest if 400 <= status < 500 else EngineFailure
        raise kind(f"{url} answers {status}: {answer['error']['message']}")
    return answer  # type: ignore[no-any-return]


def _session() -> Any:
    """The session of this event loop; it ends with the process."""
    aiohttp: Any = require("aiohttp", "http")
    loop = asyncio.get_running_loop()
    if loop not in _sessions:
        key = os.environ.get("MIDLOGIT_API_KEY", "").split()
        _sessions[loop] = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Authorization": f"Bearer {key[0]}"} if key else {},
        )
    return _sessions[loop]

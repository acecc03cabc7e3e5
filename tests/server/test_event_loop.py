"""Nothing holds up the event loop for longer than 50 ms, whatever a request multiplies."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tests.server.conftest import Live
from tests.server.loop_watch import watched

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = "All happy families are alike. " * 20_000
IDS = [7] * 400_000
HELLO = {"role": "user", "content": "a"}

BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": ["a"] * 2_000, "n": 128}),
    (COMPLETIONS, {"prompt": ["a"] * 10_000}),
    (COMPLETIONS, {"prompt": TEXT}),
    (COMPLETIONS, {"prompt": [IDS]}),
    (COMPLETIONS, {"prompt": [[7]] * 15_000}),
    (COMPLETIONS, {"prompt": ["a"] * 50, "max_tokens": 2, "logprobs": 20, "stream": True}),
    (COMPLETIONS, {"prompt": ["a " * 300] * 4, "max_tokens": 0, "echo": True, "logprobs": 20}),
    (COMPLETIONS, {"prompt": "a", "stop": ["x" * 50_000] * 4}),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {str(n): 1 for n in range(100_000)}}),
    (CHAT, {"messages": [HELLO] * 1_500, "max_tokens": 1}),
    (CHAT, {"messages": [HELLO] * 20_000}),
    (CHAT, {"messages": [{"role": "user", "content": TEXT}]}),
    ("/tokenize", {"prompt": TEXT * 10}),
    ("/tokenize", {"prompt": "Once " * 100_000}),
    ("/tokenize", {"prompt": "a" * 9 * 2**20}),
    ("/detokenize", {"tokens": IDS}),
    ("/detokenize", {"tokens": [7] * 100_000}),
]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=lambda value: json.dumps(value)[:60])
def test_requests_hold_up_nobody(server: Live, path: str, body: dict[str, Any]) -> None:
    held: list[tuple[float, str]] = []
    with watched(lambda *told: held.append(told)):
        assert server.post(path, body).status_code in (200, 400, 413, 422)
        server.wait_idle(60)
    assert not held


def test_a_callback_that_holds_up_the_loop_is_told() -> None:
    def slow() -> None:
        end = time.thread_time() + 0.07
        while time.thread_time() < end:
            pass

    async def run() -> None:
        asyncio.get_running_loop().call_soon(slow)
        await asyncio.sleep(0)

    held: list[tuple[float, str]] = []
    with watched(lambda *told: held.append(told)):
        asyncio.run(run())
    ((seconds, name),) = held
    assert seconds > 0.05 and "slow" in name

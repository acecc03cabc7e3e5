"""prime-rl's rollout client samples from a midlogit server: `check_prime_rl.py URL MODEL TOKENIZER WEIGHTS`.

MODEL is the policy's name, TOKENIZER has its chat template, WEIGHTS is a folder of new ones below --weights-root. The
client is verifiers' TrainClient, which prime-rl hands its environments. prime-rl itself is not on PyPI: where a
checkout is on PYTHONPATH (its src and packages/prime-rl-configs/src), its own pool of inference servers updates the
weights. Imports no midlogit.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import httpx
from verifiers.v1.clients.train import TrainClient
from verifiers.v1.configs.client import TrainClientConfig
from verifiers.v1.dialects import ChatDialect
from verifiers.v1.types import Response, SamplingConfig

URL, MODEL, TOKENIZER, WEIGHTS = *sys.argv[1:4], Path(sys.argv[4])
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "What do cats like?"}]}


async def roll_out(client: TrainClient, version: str, **extra_body: object) -> Response:
    """One rollout with the sampling parameters of prime-rl's orchestrator."""
    sampling = SamplingConfig(
        temperature=1.0,
        top_p=1.0,
        logprobs=True,
        max_completion_tokens=24,
        extra_body={
            "top_k": -1,
            "min_p": 0.0,
            "return_token_ids": True,
            "cache_salt": version,
            **extra_body,
        },
    )
    return await client.get_response(ChatDialect(), BODY, sampling, session_id="a")


async def update() -> None:
    """New weights, by prime-rl's own code where it is there, else by the calls that it makes."""
    if importlib.util.find_spec("prime_rl") is None:
        async with httpx.AsyncClient(base_url=URL, timeout=None) as http:
            for path, body in (
                ("/pause?mode=keep&clear_cache=false", None),
                ("/update_weights", {"weight_dir": WEIGHTS.as_posix()}),
                ("/resume", None),
            ):
                (await http.post(path, json=body)).raise_for_status()
        return

    from prime_rl.configs.shared import ClientConfig
    from prime_rl.utils.client import InferencePool, init_nccl_broadcast

    pool = InferencePool(ClientConfig(base_url=f"{URL}/v1"), MODEL, train_client_type="renderer")
    await pool.wait_for_ready(MODEL, timeout=30)
    await init_nccl_broadcast(pool.admin_clients, "127.0.0.1", 29501, 5, inference_world_size=1)
    await pool.update_weights(WEIGHTS, step=1)
    await pool.stop()
    print("with prime-rl's own pool")


async def main() -> None:
    client = TrainClient(TrainClientConfig(base_url=f"{URL}/v1", renderer_model_name=TOKENIZER))
    before = await asyncio.gather(*(roll_out(client, "0") for _ in range(8)))
    await update()
    after = await asyncio.gather(*(roll_out(client, "1") for _ in range(8)))
    for response in (*before, *after):
        tokens = response.tokens
        assert tokens is not None and len(tokens.completion_logprobs) == len(tokens.completion_ids)
        assert all(logprob <= 0 for logprob in tokens.completion_logprobs)
        assert response.finish_reason in ("stop", "length")
        assert response.usage is not None
        assert response.usage.completion_tokens == len(tokens.completion_ids)
    assert len({tuple(response.tokens.completion_ids) for response in before}) > 1
    await client.close()


asyncio.run(main())
print("fine")

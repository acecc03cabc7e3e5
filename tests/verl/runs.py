"""A run of verl up to its trainer: the recipe's configuration, verl's client, balancer and worker; no Ray processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from inspect import isawaitable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.protocol import DataProto
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from tests.conftest import BASE

RECIPE = Path(__file__).parents[2] / "examples" / "train" / "verl"
WIDTH, LENGTH = 64, 8  # tokens of prompts and of responses
# The bundled base has no chat template of its own.
TEMPLATE = "{% for m in messages %}Question: {{ m['content'] }}\nAnswer:{% endfor %}"
WORDS = ("fox", "moon", "boat", "tree", "cat", "king", "rain", "cake")
PROMPTS = [[{"role": "user", "content": f"Tell me a story of a {word}."}] for word in WORDS]


def configured(teacher: str, *overrides: str) -> DictConfig:
    """The configuration that verl composes of the recipe."""
    rollout = "actor_rollout_ref.rollout"
    with initialize_config_dir(str(RECIPE), version_base=None):
        config = compose(
            "midlogit",
            [
                f"actor_rollout_ref.model.path={BASE}",
                "++actor_rollout_ref.model.override_config.attn_implementation=eager",
                f"data.max_prompt_length={WIDTH}",
                f"data.max_response_length={LENGTH}",
                f"{rollout}.custom.midlogit.teacher={teacher}",
                *overrides,
            ],
        )
    config.actor_rollout_ref.model.custom_chat_template = TEMPLATE
    return config


class Handle:
    """What a handle of a Ray actor is to its callers, of an object in this process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return _Method(getattr(self._actor, name))


class _Method:
    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        result = self._method(*args, **kwargs)
        return asyncio.ensure_future(result if isawaitable(result) else _value(result))


async def _value(value: Any) -> Any:
    return value


class Replica:
    """Speaks as verl's vLLMHttpServer does, over a vLLM server in another process.

    Attributes:
        calls: sampling parameters of each `generate`.
    """

    def __init__(self, url: str) -> None:
        self.address = url.removeprefix("http://").removesuffix("/v1")
        self.global_steps: int | None = 0
        self.calls: list[dict[str, Any]] = []
        self._admits = asyncio.Event()
        self._admits.set()

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        self.calls.append(sampling_params)
        await self._admits.wait()
        body = {"max_tokens": LENGTH, "ignore_eos": False, **sampling_params}
        body |= {"prompt": prompt_ids, "logprobs": 0, "return_token_ids": True}
        choice = (await self._post("/v1/completions", body))["choices"][0]
        return TokenOutput(
            token_ids=choice["token_ids"],
            log_probs=choice["logprobs"]["token_logprobs"],
            stop_reason="aborted" if choice["finish_reason"] == "abort" else "completed",
            extra_fields={"global_steps": self.global_steps},
        )

    async def abort_all_requests(self) -> None:
        """Ends what runs, and holds back what comes, as verl does before each update."""
        self._admits.clear()
        await self._post("/pause?mode=abort", {})

    async def load(self, folder: Path, global_steps: int) -> None:
        """New weights, of this trainer step."""
        path = {"weights_path": str(folder)}
        await self._post("/collective_rpc", {"method": "reload_weights", "kwargs": path})
        await self._post("/reset_prefix_cache", {})
        self.global_steps = global_steps

    async def resume_generation(self) -> None:
        await self._post("/resume", {})
        self._admits.set()

    async def update(self, folder: Path, global_steps: int) -> None:
        """All of an update, in verl's order."""
        await self.abort_all_requests()
        await self.load(folder, global_steps)
        await self.resume_generation()

    async def sleep(self) -> None:
        """Nothing: no trainer needs its memory."""

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://{self.address}{path}", json=body) as answer,
        ):
            assert answer.status == 200, await answer.text()
            with suppress(aiohttp.ContentTypeError):
                return await answer.json()


def client_of(config: DictConfig, *replicas: Replica) -> LLMServerClient:
    """verl's client over verl's balancer."""
    servers = {replica.address: Handle(replica) for replica in replicas}
    return LLMServerClient(config, Handle(GlobalRequestLoadBalancer(servers)))


async def roll_out(
    config: DictConfig,
    *replicas: Replica,
    prompts: Sequence[Any] = PROMPTS,
    n: int = 1,
    validate: bool = False,
) -> DataProto:
    """The batch that verl's own worker makes of `n` rollouts of each prompt, all at once."""
    rows = [prompt for prompt in prompts for _ in range(n)]
    raw = np.empty(len(rows), dtype=object)
    raw[:] = rows
    batch = DataProto(
        non_tensor_batch={"raw_prompt": raw, "index": np.arange(len(rows))},
        meta_info={"global_steps": 0, "validate": validate},
    )
    worker = AgentLoopWorker(config, client_of(config, *replicas))
    return await worker.generate_sequences(batch)

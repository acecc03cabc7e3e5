"""What verl's trainer needs on the CPU: FSDP's engine, and a replica that is a vLLM server in another process.

verl loads it in each of its processes (VERL_USE_EXTERNAL_MODULES). POLICY_URL is the server's, POLICY_FOLDER where new
weights for it are put.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import ray
import verl.utils.distributed
from safetensors.torch import save_file
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

SERVER = "policy_server"


class External(RolloutReplica):
    """A replica whose server runs already."""

    async def launch_servers(self) -> None:
        from tests.verl.runs import Replica

        url = os.environ["POLICY_URL"]
        actor = ray.remote(Replica).options(name=SERVER, num_cpus=0, max_concurrency=1000)
        self.servers = [actor.remote(url)]
        (self._server_handle,) = self.servers
        self._server_address = url.removeprefix("http://").removesuffix("/v1")


class Adapter(BaseRollout):
    """Hands the trainer's weights to the replica's server as files."""

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(
        self, weights: Any, wire_format: str = "named_tensors", *, global_steps: int, **_: Any
    ) -> None:
        folder = Path(os.environ["POLICY_FOLDER"])
        folder.mkdir(exist_ok=True)
        named = {name: weight.detach().float().contiguous() for name, weight in weights}
        save_file(named, folder / "model.safetensors", {"format": "pt"})
        await ray.get_actor(SERVER).update.remote(folder=folder, global_steps=global_steps)


RolloutReplicaRegistry.register("vllm", lambda: External)
_ROLLOUT_REGISTRY["vllm", "async"] = f"{__name__}.{Adapter.__name__}"
EngineRegistry.register("language_model", ["fsdp", "fsdp2"], "cpu")(FSDPEngineWithLMHead)
# verl names a backend for the CPU and one for the device, which here is the CPU again.
verl.utils.distributed.initialize_global_process_group_ray = partial(
    verl.utils.distributed.initialize_global_process_group_ray, backend="gloo"
)

"""AReaL's own engine for vLLM servers drives a midlogit server: run as `check_areal.py URL WEIGHTS`.

WEIGHTS is a folder of new weights below --weights-root. An update is that of AReaL's FSDP engine: it pauses, what runs
is aborted and asked for again, the weights are named, sampling goes on. Imports no midlogit.
"""

from __future__ import annotations

import asyncio
import sys
import time
from urllib.parse import urlsplit

from areal.api import ModelRequest, ModelResponse, WeightUpdateMeta
from areal.api.cli_args import (
    GenerationHyperparameters,
    InferenceEngineConfig,
    NameResolveConfig,
)
from areal.engine.vllm_remote import RemotevLLMEngine
from areal.utils import name_resolve, names

URL, WEIGHTS = sys.argv[1:]
PROMPT = [5, 300, 7, 42]
EXPERIMENT = {"experiment_name": "midlogit", "trial_name": "check"}


def check(response: ModelResponse, most: int) -> None:
    count = len(response.output_tokens)
    assert response.input_tokens == PROMPT and 0 < count <= most
    assert len(response.output_logprobs) == len(response.output_versions) == count
    assert all(logprob <= 0 for logprob in response.output_logprobs)
    assert response.stop_reason == ("length" if count == most else "stop")


def update(engine: RemotevLLMEngine) -> None:
    """The steps of `FSDPEngine._update_weights_from_disk`."""
    engine.pause_generation()
    meta = WeightUpdateMeta(type="disk", path=WEIGHTS, clear_checkpoint_after_load=False)
    loaded = engine.update_weights_from_disk(meta)
    saved = names.update_weights_from_disk(*EXPERIMENT.values(), engine.get_version())
    name_resolve.add(saved, str(time.time()), keepalive_ttl=120)
    loaded.result()
    engine.set_version(1)
    engine.continue_generation()


async def roll_out(engine: RemotevLLMEngine) -> None:
    def ask(most: int, **options: object) -> asyncio.Task[ModelResponse]:
        parameters = GenerationHyperparameters(max_new_tokens=most, **options)
        return asyncio.create_task(
            engine.agenerate(ModelRequest(input_ids=PROMPT, gconfig=parameters))
        )

    for response in await asyncio.gather(*(ask(16, stop_token_ids=[0, 1]) for _ in range(8))):
        check(response, 16)
        assert set(response.output_versions) == {0}

    long = [ask(200, ignore_eos=True) for _ in range(4)]
    await asyncio.sleep(0.2)
    await asyncio.to_thread(update, engine)
    for response in await asyncio.gather(*long):
        check(response, 200)
    response = await ask(16)
    check(response, 16)
    assert set(response.output_versions) == {1}


def main() -> None:
    name_resolve.reconfigure(NameResolveConfig(type="nfs", nfs_record_root="records"))
    engine = RemotevLLMEngine(
        InferenceEngineConfig(
            backend="vllm:d1", setup_timeout=60, pause_grace_period=0.1, **EXPERIMENT
        )
    )
    engine.initialize(addr=urlsplit(URL).netloc)
    try:
        asyncio.run(roll_out(engine))
    finally:
        engine.destroy()


if __name__ == "__main__":  # AReaL updates weights in a process of its own
    main()
    print("fine")

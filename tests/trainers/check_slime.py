"""slime's own classes sample from a midlogit server: run as `check_slime.py URL MODEL WEIGHTS PROMPTS`.

PYTHONPATH holds slime's checkout and midlogit. slime's rollout loop calls `midlogit.integrations.slime.generate`; its
engine class finds the server, registers it with SGLang's router, and updates its weights from WEIGHTS; its Dataset
reads PROMPTS, an export. SGLang itself is not installed: the two names that slime imports of it are not called for a
server that slime did not start.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
import types
from argparse import Namespace
from dataclasses import make_dataclass
from urllib.parse import urlsplit

import requests

URL, MODEL, WEIGHTS, PROMPTS = sys.argv[1:]


def stand_in_for_sglang() -> None:
    names = "node_rank host port nnodes tp_size dp_size pp_size ep_size enable_memory_saver"
    for name in ("sglang", "sglang.srt", "sglang.srt.server_args", "sglang.srt.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["sglang.srt.server_args"].ServerArgs = make_dataclass("ServerArgs", names.split())
    sys.modules["sglang.srt.utils"].kill_process_tree = None


stand_in_for_sglang()

from slime.backends.sglang_utils import external, sglang_engine  # noqa: E402
from slime.rollout import sglang_rollout  # noqa: E402
from slime.utils.data import Dataset  # noqa: E402
from slime.utils.http_utils import init_http_client  # noqa: E402
from slime.utils.types import Sample  # noqa: E402

ADDRESS = urlsplit(URL).netloc


def arguments(router_port: int) -> Namespace:
    """slime's, with its defaults; a batch of 4 groups of 4, of the 6 groups that are started."""
    return Namespace(
        apply_chat_template=False,
        apply_chat_template_kwargs={},
        ci_test=False,
        colocate=False,
        custom_generate_function_path="midlogit.integrations.slime.generate",
        custom_rm_path=f"{__name__}.reward",
        debug_rollout_only=False,
        actor_num_gpus_per_node=1,
        actor_num_nodes=1,
        dynamic_sampling_filter_path=None,
        fp16=False,
        group_rm=False,
        hf_checkpoint=MODEL,
        mask_offpolicy_in_partial_rollout=True,
        n_samples_per_prompt=4,
        num_gpus_per_node=1,
        offload_rollout=False,
        over_sampling_batch_size=6,
        partial_rollout=True,
        rollout_all_samples_process_path=None,
        rollout_batch_size=4,
        rollout_external=True,
        rollout_external_engine_addrs=[ADDRESS],
        rollout_global_dataset=True,
        rollout_max_response_len=200,
        rollout_num_gpus_per_engine=1,
        rollout_sample_filter_path=None,
        rollout_sample_hook_path=None,
        rollout_seed=1,
        rollout_skip_special_tokens=False,
        rollout_stop=None,
        rollout_stop_token_ids=None,
        rollout_temperature=1.0,
        rollout_top_k=-1,
        rollout_top_p=1.0,
        router_policy=None,
        seed=1,
        sglang_dp_size=1,
        sglang_ep_size=1,
        sglang_pp_size=1,
        sglang_router_ip="127.0.0.1",
        sglang_router_port=router_port,
        sglang_server_concurrency=64,
        update_weight_mode="full",
        update_weight_transport="disk",
        use_distributed_post=False,
        use_rollout_logprobs=False,
        use_rollout_routing_replay=False,
        use_tis=True,
    )


async def reward(args: Namespace, sample: Sample, **_: object) -> float:
    return float(len(sample.response))


def start_router() -> tuple[subprocess.Popen[bytes], int]:
    """SGLang's router on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--disable-circuit-breaker"]
    router = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    for _ in range(600):
        try:
            requests.get(f"http://127.0.0.1:{port}/workers", timeout=5).raise_for_status()
            return router, port
        except requests.RequestException:
            time.sleep(0.1)
    raise TimeoutError("the router did not start")


def connect(args: Namespace) -> sglang_engine.SGLangEngine:
    """As `start_external_rollout_servers`, without Ray."""
    external.apply_external_engine_info_to_args(args)
    (info,) = external.external_engine_infos_from_args(args)
    assert (info.num_gpus, info.worker_type, info.parallel_config["tp_size"]) == (1, "regular", 1)
    sglang_engine.accelerator.resolve_visible_device_id = int  # of a machine without accelerators
    engine = sglang_engine.SGLangEngine(args, rank=0, base_gpu_id=0, num_gpus_per_engine=1)
    engine.init(**external.external_engine_init_kwargs(info))
    workers = f"http://127.0.0.1:{args.sglang_router_port}/workers"
    for _ in range(300):
        if any(worker["url"] == URL for worker in requests.get(workers).json()["workers"]):
            return engine
        time.sleep(0.1)
    raise TimeoutError("the router does not list the server")


def update(engine: sglang_engine.SGLangEngine) -> None:
    """As `RayTrainGroup._reload_rollout_weights_from_disk`."""
    engine.pause_generation()
    engine.flush_cache()
    engine.update_weights_from_disk(model_path=WEIGHTS, weight_version="1")
    assert engine.get_weight_version() == "1"
    engine.continue_generation()


class Source:
    """Groups of samples, those that were cut off first."""

    def __init__(self, args: Namespace) -> None:
        self.args, self.buffer, self.count = args, [], 0

    def get_samples(self, groups: int) -> list[list[Sample]]:
        taken, self.buffer = self.buffer[:groups], self.buffer[groups:]
        while len(taken) < groups:
            prompt = [{"role": "user", "content": "Tell me a story."}] if self.count % 2 else "Once"
            taken.append(
                [
                    Sample(group_index=self.count, index=self.count * 4 + k, prompt=prompt)
                    for k in range(self.args.n_samples_per_prompt)
                ]
            )
            self.count += 1
        return taken


async def roll_out(args: Namespace, source: Source, rollout_id: int) -> list[list[Sample]]:
    output, aborted = await sglang_rollout.generate_rollout_async(
        args, rollout_id, source.get_samples
    )
    source.buffer += aborted
    return output.samples


def check(groups: list[list[Sample]], versions: set[str]) -> None:
    assert len(groups) == 4
    for sample in (sample for group in groups for sample in group):
        sample._validate_response_metadata_lengths()
        again = Sample.from_dict(sample.to_dict())
        assert len(again.teacher_log_probs) == again.response_length > 0
        assert len(again.loss_mask) == again.response_length
        assert set(sample.weight_versions) <= versions and again.reward == len(again.response)
        assert sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED)


async def train(args: Namespace, engine: sglang_engine.SGLangEngine) -> None:
    source = Source(args)
    check(await roll_out(args, source, 0), set())
    cut_off = sum(sample.response_length > 0 for group in source.buffer for sample in group)
    await asyncio.to_thread(update, engine)
    groups = await roll_out(args, source, 1)
    check(groups, {"1"})
    print(f"{cut_off} samples were cut off, {len(source.buffer)} groups are left")


def check_prompts() -> None:
    """slime's Dataset reads the export."""
    from transformers import AutoTokenizer

    rows = Dataset(
        PROMPTS, AutoTokenizer.from_pretrained(MODEL), None, 512, prompt_key="prompt",
        label_key="label", apply_chat_template=False,
    ).samples  # fmt: skip
    assert rows and all(row.label is not None and row.metadata["row_id"] for row in rows)


def main() -> None:
    if PROMPTS != "none":
        check_prompts()
    router, port = start_router()
    try:
        args = arguments(port)
        engine = connect(args)
        init_http_client(args)
        asyncio.run(train(args, engine))
    finally:
        router.terminate()


if __name__ == "__main__":
    main()
    print("fine")

"""GRPO in TRL's server mode: the trainer on one GPU, `midlogit serve --train` on another, and NCCL between them.

    python examples/train/two_gpus.py                                  # the bundled pair, two GPUs
    python examples/train/two_gpus.py --base STUDENT --teacher TEACHER --dtype bfloat16

Nothing of midlogit is in the trainer: TRL talks to the server as to vLLM's, and the log-probabilities that it gets are
log q. Prints a line of JSON for each step: seconds and checksums of the weights' way to the server, the reward, tokens
a second. The last line has tokens a second without training, in training, and of training as a whole.

Without GPUs the weights go by files, and a stub stands for the names of vLLM that TRL imports:

    PYTHONPATH=tests/trl/stub python examples/train/two_gpus.py --cpu --steps 2 --batch 16
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOUNS = ["fox", "ball", "tree", "boat", "cake", "dog", "cat", "bird", "bear", "car", "flower"]
LENGTH = 64


def main() -> None:
    options = read_options()
    if not options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = options.trainer_gpu  # before torch is imported
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # both are on this machine

    with serving(options) as url:
        watched = Watched(make_trainer(options, url), url, options.dtype)
        without = watched.speed_without_training()
        start = time.perf_counter()
        watched.trainer.train()
        seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "device": options.device_name,
                "steps": len(watched.syncs),
                "syncs_equal": all(sync["equal"] for sync in watched.syncs),
                "sync_s": [sync["seconds"] for sync in watched.syncs],
                "tokens_per_s_without_training": round(without),
                "tokens_per_s_of_rollouts": round(watched.tokens / watched.generating_s),
                "tokens_per_s_of_training": round(watched.tokens / seconds),
            }
        ),
        flush=True,
    )


@contextmanager
def serving(options: argparse.Namespace) -> Iterator[str]:
    """The URL of a server on the other GPU, for the duration of the block."""
    port = options.port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "midlogit", "serve", "--train", "--port", str(port)]
    command += ["--max-num-seqs", str(options.batch), "--dtype", options.dtype]
    if options.base is not None:
        command += ["--base", options.base, "--teacher", options.teacher]
    environment = dict(os.environ)
    if options.cpu:
        os.environ["MIDLOGIT_WEIGHTS_ROOT"] = tempfile.mkdtemp()
        command += ["--device", "cpu", "--weights-root", os.environ["MIDLOGIT_WEIGHTS_ROOT"]]
    else:
        environment["CUDA_VISIBLE_DEVICES"] = options.server_gpu
        command += ["--engine", "vllm", "--gpu-memory-utilization", "0.8"]
        command += ["--max-model-len", str(options.max_model_len)]

    Path(options.out).mkdir(parents=True, exist_ok=True)
    with (Path(options.out) / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stderr=log)
    try:
        while not is_healthy(url):
            if process.poll() is not None:
                sys.exit(f"The server did not start: see {options.out}/server.log.")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # not there yet, or loading
        return False


def make_trainer(options: argparse.Namespace, url: str) -> Any:
    """A GRPOTrainer of the base that rolls out on the server; TRL's defaults except for sizes."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from trl.generation.vllm_client import VLLMClient

    from midlogit.models.checkpoint import bundled

    if options.cpu:  # TRL refuses devices on which there is no NCCL
        init = VLLMClient.init_communicator
        VLLMClient.init_communicator = lambda self, device: init(self, "cuda")

    base = options.base or bundled("base")
    prompts = [f"Question: Tell me a story about a {noun}.\nAnswer:" for noun in NOUNS]
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, options.dtype)),
        happy_end,
        GRPOConfig(
            options.out,
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=url,
            generation_kwargs={"midlogit": {"alpha_rule": options.rule}} if options.rule else None,
            per_device_train_batch_size=options.batch,
            num_generations=8,
            max_completion_length=LENGTH,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            logging_steps=1,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
            bf16=False,
            use_cpu=options.cpu,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts * options.batch}),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


def happy_end(completions: list[str], **_: Any) -> list[float]:
    return [float("happy" in text) for text in completions]


class Watched:
    """A trainer whose syncs and rollouts are timed, and whose weights are compared with the server's.

    Attributes:
        syncs: seconds of each, and whether the checksums agree. tokens, generating_s: of all rollouts.
    """

    def __init__(self, trainer: Any, url: str, dtype: str) -> None:
        self.trainer = trainer
        self.syncs: list[dict[str, Any]] = []
        self.tokens, self.generating_s = 0, 0.0
        self._url, self._dtype = url, dtype
        generation = trainer.vllm_generation
        self._sync, self._generate = generation.sync_weights, generation.generate
        generation.sync_weights, generation.generate = self.sync, self.generate

    def sync(self) -> None:
        start = time.perf_counter()
        self._sync()
        seconds = time.perf_counter() - start
        ours, theirs = self.checksum(), self.checksum_of_the_server()
        found = {"seconds": round(seconds, 3), "trainer": ours, "server": theirs}
        self.syncs.append({**found, "equal": ours == theirs})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        answer = self._generate(*args, **kwargs)
        seconds = time.perf_counter() - start
        tokens = sum(map(len, answer[1]))
        self.tokens, self.generating_s = self.tokens + tokens, self.generating_s + seconds

        logged = [entry["reward"] for entry in self.trainer.state.log_history if "reward" in entry]
        line = {
            "step": self.trainer.state.global_step,
            "sync": self.syncs[-1],
            "tokens": tokens,
            "generate_s": round(seconds, 3),
            "reward_of_last_step": logged[-1] if logged else None,
        }
        print(json.dumps(line), flush=True)
        return answer

    def checksum(self) -> int:
        """The sum of the bits of the weights in the server's dtype."""
        import torch

        dtype = getattr(torch, self._dtype)
        integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        weights = self.trainer.model.parameters()
        return sum(int(w.detach().to(dtype).view(integer).sum(dtype=torch.int64)) for w in weights)

    def checksum_of_the_server(self) -> int:
        request = urllib.request.Request(
            f"{self._url}/weight_checker",
            data=json.dumps({"action": "checksum"}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return int(json.load(answer)["checksums"]["base"])

    def speed_without_training(self) -> float:
        """Tokens a second of the server, after one batch to warm up."""
        batch = self.trainer.args.per_device_train_batch_size
        tokenizer = self.trainer.processing_class
        prompts = self.trainer.train_dataset[: batch // 8]["prompt"]
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        client = self.trainer.vllm_generation.vllm_client

        def generate() -> int:
            return sum(map(len, client.generate(ids, n=8, max_tokens=LENGTH)["completion_ids"]))

        generate()
        start = time.perf_counter()
        tokens = sum(generate() for _ in range(3))
        return tokens / (time.perf_counter() - start)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="the student; the bundled base by default")
    parser.add_argument("--teacher")
    parser.add_argument("--rule", help="of α, such as kl-budget:0.01; the preset's by default")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=256, help="completions a step")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--dtype", default="float32", help="of the weights on both sides")
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--trainer-gpu", default="0")
    parser.add_argument("--server-gpu", default="1")
    parser.add_argument("--port", type=int, help="a free one by default")
    parser.add_argument("--out", default="out/two_gpus")
    parser.add_argument("--cpu", action="store_true", help="no GPUs, and weights by files")
    options = parser.parse_args()
    options.device_name = "cpu" if options.cpu else "cuda"
    return options


if __name__ == "__main__":
    main()

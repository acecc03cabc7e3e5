"""The local engine on a real pair in lock-step: its time against the two models' own `generate`, and its memory.

    python -m benchmarks.local --base FOLDER/qwen-0.5b --teacher FOLDER/qwen-1.5b

12 chat prompts, 64 tokens each, different prompts for each side. Each round times the base's generate,
the teacher's generate and the pair in one process, in turn, for the same number of steps; the medians
go to benchmarks/results/local.json. Peak memory is of a process that runs the pair alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path
from statistics import fmean, median

TOKENS = 64
BASE_SYSTEM = "You write short, plain answers."
PROMPTS = [
    "What is a hash table?",
    "Explain recursion to a child.",
    "Write a Python function that reverses a string.",
    "Why is the sky blue?",
    "Name three uses of a paper clip.",
    "What does HTTP status 404 mean?",
    "Write a haiku about autumn.",
    "How do I undo my last git commit?",
    "What is the difference between a list and a tuple?",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "Summarise how a bicycle stays upright.",
]
RESULTS = Path(__file__).parent / "results" / "local.json"


def messages() -> tuple[list, list]:
    """(base prompts, teacher prompts) as chat messages."""
    teacher = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return [[{"role": "system", "content": BASE_SYSTEM}, *m] for m in teacher], teacher


def pair_params(preset: str):
    from midlogit import SamplingParams

    return SamplingParams.preset(preset, max_tokens=TOKENS, seed=1, ignore_eos=True)


def time_generate(side, prompts) -> float:
    """Seconds of a model's own sampled generate, left-padded, TOKENS new tokens each."""
    import torch

    checkpoint, model = side
    ids = [checkpoint.encode_chat(m) for m in prompts]
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            padded, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            min_new_tokens=TOKENS, max_new_tokens=TOKENS, pad_token_id=0,
        )  # fmt: skip
    return time.perf_counter() - start


def compare(base: str, teacher: str, dtype: str, rounds: int) -> dict:
    """Times of both models' generate and of the pair, for both supports."""
    from midlogit import Pair

    base_prompts, teacher_prompts = messages()
    with Pair.local(base, teacher, dtype=dtype, device="cpu", speculation="off") as pair:
        engine = pair.engine
        sides = [(pair.mixing.base, engine.base.model), (pair.mixing.teacher, engine.teacher.model)]
        times: dict[str, list[float]] = {
            "base": [],
            "teacher": [],
            "balanced": [],
            "exploratory": [],
        }
        figures = {}
        for _ in range(rounds):
            times["base"].append(time_generate(sides[0], base_prompts))
            times["teacher"].append(time_generate(sides[1], teacher_prompts))
            for preset in ("balanced", "exploratory"):
                start = time.perf_counter()
                found = pair.generate(
                    base_prompts=base_prompts,
                    teacher_prompts=teacher_prompts,
                    params=pair_params(preset),
                    progress=False,
                )
                times[preset].append(time.perf_counter() - start)
                free = [
                    (a, k)
                    for c in found
                    for a, k, f in zip(
                        c.diagnostics.alpha,
                        c.diagnostics.kl_base,
                        c.diagnostics.forced,
                        strict=False,
                    )
                    if not f
                ]
                figures[preset] = {
                    "mean_alpha": fmean(a for a, _ in free),
                    "mean_kl": fmean(k for _, k in free),
                }
            print(
                {name: [round(t, 1) for t in values] for name, values in times.items()},
                file=sys.stderr,
            )
    seconds = {name: median(values) for name, values in times.items()}
    both = [b + t for b, t in zip(times["base"], times["teacher"], strict=True)]
    for preset in figures:
        figures[preset]["ratio_to_both_generates"] = median(
            p / s for p, s in zip(times[preset], both, strict=True)
        )
        figures[preset]["tokens_per_s"] = len(PROMPTS) * TOKENS / seconds[preset]
    return {"seconds": seconds, "presets": figures}


class PeakMemory:
    """The largest anonymous memory of this process, sampled; file pages of mapped weights are the kernel's to drop."""

    def __enter__(self) -> PeakMemory:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            line = next(
                x
                for x in Path("/proc/self/status").read_text().splitlines()
                if x.startswith("RssAnon")
            )
            self.bytes = max(self.bytes, int(line.split()[1]) * 1024)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def measure_memory(base: str, teacher: str, dtype: str) -> dict:
    """Peak memory of this process over loading and one run of the pair, against weights and caches."""
    from midlogit import Pair

    base_prompts, teacher_prompts = messages()
    with (
        PeakMemory() as peak,
        Pair.local(base, teacher, dtype=dtype, device="cpu", speculation="off") as pair,
    ):
        pair.generate(
            base_prompts=base_prompts,
            teacher_prompts=teacher_prompts,
            params=pair_params("exploratory"),
        )
        sides = (pair.engine.base, pair.engine.teacher)
        models = {id(side.model): side.model for side in sides}.values()
        weights = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
        caches = sum(side.cache_bytes for side in sides)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "peak_gb": peak.bytes / 1e9,
        "weights_gb": weights / 1e9,
        "caches_gb": caches / 1e9,
        "over_weights_and_caches_gb": (peak.bytes - weights - caches) / 1e9,
        "peak_resident_with_mapped_files_gb": resident / 1e9,
    }


def circumstances(base: str, teacher: str, dtype: str) -> dict:
    """When, where and with what something is measured."""
    import torch
    import transformers

    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "models": [Path(base).name, Path(teacher).name],
        "dtype": dtype,
    }


def pair_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark of two given models."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--teacher", required=True)
    return parser


def main() -> None:
    parser = pair_parser(__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--memory-only", action="store_true", help="print the memory of one run and end"
    )
    args = parser.parse_args()
    if args.memory_only:
        print(json.dumps(measure_memory(args.base, args.teacher, args.dtype)))
        return
    own = [
        sys.executable,
        "-m",
        "benchmarks.local",
        "--base",
        args.base,
        "--teacher",
        args.teacher,
        "--dtype",
        args.dtype,
    ]
    memory = json.loads(
        subprocess.run([*own, "--memory-only"], capture_output=True, text=True, check=True).stdout
    )
    result = {
        **circumstances(args.base, args.teacher, args.dtype),
        "batch": len(PROMPTS),
        "tokens": TOKENS,
        "memory": memory,
        **compare(args.base, args.teacher, args.dtype, args.rounds),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

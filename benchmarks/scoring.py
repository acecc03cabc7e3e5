"""Seconds of `Pair.score` against both models' own prompt processing of the same texts, in one run.

    python -m benchmarks.scoring                      random weights in the shapes of Qwen3-4B and Qwen3-14B, on a GPU
    python -m benchmarks.scoring --base FOLDER --teacher FOLDER          another pair
    python -m benchmarks.scoring --texts 4 --tokens 100 --layers 2       to try the plumbing

Each model alone is vLLM's own `LLM.generate` in a process of its own: for one token after each text, and with
`prompt_logprobs=0` too, which adds the head and a softmax at each position, as scoring does. Every number is a median.
Forward passes are eager on both sides unless `--compiled` asks for vLLM's defaults, which take a minute more to open
each. benchmarks/real_pair.py measures the same of a real pair.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import measure_alone, open_alone, write_models, write_results

RESULTS = Path(__file__).parent / "results" / "scoring.json"
REPEATS = 3
CPU_CACHE = 2**29  # bytes for the keys and values of a model alone on a CPU
ALONE = ("prompts_s", "prompt_logprobs_s")


def given_texts(num_texts: int, tokens: int, vocabulary: int = 100_000) -> list[list[int]]:
    """Texts of so many ids, all different: what they say does not change the time."""
    ids = range(num_texts)
    return [[(37 * text + 11 * n) % vocabulary for n in range(tokens)] for text in ids]


def median_s(call: Callable[[], Any]) -> float:
    """Seconds of a call, once it has been made before."""
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def time_prompts(llm: Any, texts: list[list[int]]) -> dict[str, float]:
    """Seconds of one model's own prompt processing of texts, by the names of `ALONE`."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": ids} for ids in texts]
    found = {}
    for name, prompt_logprobs in zip(ALONE, (None, 0), strict=True):
        params = SamplingParams(
            max_tokens=1, prompt_logprobs=prompt_logprobs, detokenize=False, ignore_eos=True
        )
        found[name] = median_s(lambda params=params: llm.generate(asked, params, use_tqdm=False))
    return found


def time_scoring(
    pair: Any, texts: list[list[int]], alone: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """A row for each kind of settings.

    Args:
        alone: what `time_prompts` found, by side.
    """
    from midlogit import SamplingParams

    sums = {name: sum(found[name] for found in alone.values()) for name in ALONE}
    asked = {
        "exploratory": SamplingParams.preset("exploratory"),
        "balanced": SamplingParams.preset("balanced"),
        "exploratory, top_logprobs=1": SamplingParams.preset("exploratory", top_logprobs=1),
    }
    rows = []
    for name, params in asked.items():

        def score(params: SamplingParams = params) -> None:
            for scores in pair.score(texts, params):
                if scores.error:
                    raise RuntimeError(scores.error)

        took = median_s(score)
        rows.append(
            {
                "settings": name,
                "texts": len(texts),
                "tokens": len(texts[0]),
                "score_s": took,
                **{f"{key.removesuffix('_s')}_alone_s": seconds for key, seconds in sums.items()},
                "ratio": took / sums["prompts_s"],
                "ratio_to_prompt_logprobs": took / sums["prompt_logprobs_s"],
            }
        )
        print(
            f"{name}: {took:.2f} s, {rows[-1]['ratio']:.2f} times both models' prompts", flush=True
        )
    return rows


def measure(folders: dict[str, str], options: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Times both models alone and the pair, and writes the results."""
    import torch

    from midlogit import Pair

    on_gpu = torch.cuda.is_available()
    size = chosen.texts, chosen.tokens, chosen.vocabulary
    own = options if on_gpu else {**options, "kv_cache_memory_bytes": CPU_CACHE}
    alone = measure_alone(
        {
            side: ["benchmarks.scoring", "--alone", json.dumps([folder, own, size])]
            for side, folder in folders.items()
        }
    )
    with Pair.vllm(**folders, **options) as pair:
        rows = time_scoring(pair, given_texts(*size), alone)
    write_results(chosen.output, torch.cuda.get_device_name() if on_gpu else "cpu", rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base")
    parser.add_argument("--teacher")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--vocabulary", type=int, default=100_000, help="texts have ids below it")
    parser.add_argument("--layers", type=int, help="layers of both random models")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true", help="vLLM's graphs and compiler")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # the process of one model
    chosen = parser.parse_args()
    if chosen.alone:
        folder, options, size = json.loads(chosen.alone)
        llm = open_alone(folder, enable_prefix_caching=False, **options)
        print("RESULT" + json.dumps(time_prompts(llm, given_texts(*size))))
        return

    options = {"max_model_len": chosen.tokens + 1, "max_num_seqs": 64, "dtype": chosen.dtype}
    options["enforce_eager"] = not chosen.compiled
    if chosen.base and chosen.teacher:
        measure({"base": chosen.base, "teacher": chosen.teacher}, options, chosen)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_models(Path(scratch), chosen.layers)
        measure(
            {side: str(folder) for side, folder in folders.items()},
            {**options, "load_format": "dummy"},
            chosen,
        )


if __name__ == "__main__":
    main()

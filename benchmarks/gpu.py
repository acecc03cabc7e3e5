"""Step times on one GPU: each model alone in vLLM, the pair, and the solve and draw, in one run.

    python -m benchmarks.gpu                   all batch sizes; writes benchmarks/results/gpu.json
    python -m benchmarks.gpu --drafts FILE     and tokens a second with drafts (benchmarks/speculation.py) into FILE
    python -m benchmarks.gpu --layers 2 --batches 1,8      smaller models, to try the plumbing

The models have random weights in the shapes of Qwen3-4B and Qwen3-14B. Each model alone is vLLM's own `LLM.generate`
in a process of its own, as its defaults have it. A step's time is the difference between completions of two lengths
over the difference of the lengths, so prompts do not count; every number is a median of repeats. The parts of a step
are the same differences of the same two completions, so they add up to no more than the step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu.json"
VOCABULARY = 151_936
Spent = defaultdict[str, float]  # seconds by part
REST = "rest of the step"  # the part of a step that is in no other part
UNEVEN = 0.02  # share of a step by which the starts and ends of two completions may differ
STOPS = (151_643, 151_645)
PROMPT_TOKENS, SHORT, LONG, REPEATS = 128, 16, 80, 3
COMMON = {"max_model_len": 2048, "load_format": "dummy", "max_num_seqs": 256, "dtype": "bfloat16"}
SHAPES = {
    "base": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
             "tie_word_embeddings": True},
    "teacher": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
                "tie_word_embeddings": False},
}  # fmt: skip


def write_models(folder: Path, layers: int | None) -> dict[str, Path]:
    """Model folders without weights: configuration and one tokenizer of the same size and stop ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"w{n}" for n in range(STOPS[0] - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
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
    return [[(37 * row + 11 * n) % 100_000 for n in range(PROMPT_TOKENS)] for row in range(batch)]


def step_ms(
    generate: Callable[[list[list[int]], int], Any], batch: int, spent: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """The median time of a step of `generate(prompts, tokens)`, and where that very time went.

    Args:
        spent: seconds by part, as `watch` adds them up while steps run; it may stay empty.

    Returns:
        (milliseconds a step, milliseconds of its parts by name).
    """
    asked = prompts(batch)
    generate(asked, SHORT)
    repeats = []
    for _ in range(REPEATS):
        short_s, short_parts = _timed(generate, asked, SHORT, spent)
        long_s, long_parts = _timed(generate, asked, LONG, spent)
        scale = 1e3 / (LONG - SHORT)
        parts_ms = {part: scale * (seconds - short_parts.get(part, 0.0)) for part, seconds in long_parts.items()}
        repeats.append((scale * (long_s - short_s), parts_ms))
    return sorted(repeats, key=lambda repeat: repeat[0])[REPEATS // 2]


def _timed(
    generate: Callable[[list[list[int]], int], Any], asked: list[list[int]], tokens: int, spent: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """Seconds of one call, and what was spent in each part meanwhile."""
    before, start = dict(spent), time.perf_counter()
    generate(asked, tokens)
    return time.perf_counter() - start, since(before, spent)


def since(before: Mapping[str, float], spent: Mapping[str, float]) -> dict[str, float]:
    """Seconds that were spent in each part since `before` was noted."""
    return {part: seconds - before.get(part, 0.0) for part, seconds in dict(spent).items()}


def checked_parts(parts_ms: dict[str, float], step_ms: float, name: str) -> dict[str, float]:
    """The parts of a step if they can be: none below zero, and together no more than the step.

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


def alone(model: Path, batches: list[int]) -> dict[int, float]:
    """Step times of one model in vLLM's own `LLM.generate`."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(model), skip_tokenizer_init=True, gpu_memory_utilization=0.6, **COMMON)

    def generate(asked: list[list[int]], tokens: int) -> None:
        params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)

    return {batch: step_ms(generate, batch, {})[0] for batch in batches}


def together(pair: Any, spent: Spent, batches: list[int]) -> dict[int, tuple[float, dict[str, float]]]:
    """Step times of the pair in lock-step, and where the engine's thread spent them (milliseconds a step)."""
    from midlogit import SamplingParams
    from midlogit.engines.draft_length import DraftLength

    found = {}
    pair.engine.draft_length = DraftLength("off")

    def generate(asked: list[list[int]], tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1)
        for completion in pair.generate(asked, params, progress=False):
            if len(completion.token_ids) != tokens:
                raise RuntimeError(completion.error)

    for batch in batches:
        ms, parts_ms = step_ms(generate, batch, spent)
        found[batch] = ms, checked_parts(parts_ms, ms, f"batch {batch}")
    return found


def watch(pair: Any) -> Spent:
    """Adds up the seconds that the engine's thread spends in each part of its steps, each second in one part only."""
    engine = pair.engine
    spent: Spent = defaultdict(float)
    inner: list[float] = []  # of each part that has begun: seconds spent in parts within it

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            inner.append(0.0)
            try:
                return call(*args)
            finally:
                took = time.perf_counter() - start
                spent[name] += took - inner.pop()
                if inner:
                    inner[-1] += took

        return run

    for side, core in zip(("base", "teacher"), engine.cores, strict=True):
        for part in ("take", "launch", "settle", "plan"):
            setattr(core, part, timed(f"{side} {part}", getattr(core, part)))

    decider, measure = engine._decider, engine._measure
    decide, start_round = timed("draw", decider.decide), timed("draw", decider.start_round)

    def watched_decision(call: Callable[..., Any], *args: Any) -> Any:
        decided = call(*args)
        decided.token_ids = timed("wait for the device", decided.token_ids)
        return decided

    def watched_round(*args: Any) -> Any:
        draft_round = start_round(*args)
        draft_round.draft = timed("draw", draft_round.draft)
        draft_round.decide = partial(watched_decision, timed("draw", draft_round.decide))
        return draft_round

    decider.decide, decider.start_round = partial(watched_decision, decide), watched_round
    engine._measure = timed("counts", measure)
    engine._publish, engine.step = timed("text", engine._publish), timed(REST, engine.step)
    return spent


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--batches", default="1,8,64,256")
    options.add_argument("--layers", type=int, help="layers of both models, to try the plumbing")
    options.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--output", type=Path, default=RESULTS)
    options.add_argument("--drafts", type=Path, help="also run benchmarks/speculation.py's part and write it there")
    chosen = options.parse_args()
    batches = [int(batch) for batch in chosen.batches.split(",")]
    if chosen.alone:
        print("RESULT" + json.dumps(alone(chosen.alone, batches)))
        return

    from midlogit import Pair

    with tempfile.TemporaryDirectory() as scratch:
        folders = write_models(Path(scratch), chosen.layers)
        single = {side: alone_apart(folder, batches) for side, folder in folders.items()}
        start = time.perf_counter()
        with Pair.vllm(folders["base"], folders["teacher"], **COMMON) as pair:
            print(f"pair: {time.perf_counter() - start:.0f} s to open", flush=True)
            spent = watch(pair)
            found = together(pair, spent, batches)
            for batch, (ms, parts_ms) in found.items():
                parts = ", ".join(f"{part} {t:.2f}" for part, t in parts_ms.items())
                print(f"batch {batch}: {ms:.2f} ms a step; {parts}", flush=True)
            write(batches, single, found, chosen.output)
            if chosen.drafts:
                from benchmarks.speculation import measure_all

                measure_all(pair, spent, single["teacher"], batches, chosen.drafts)


def alone_apart(folder: Path, batches: list[int]) -> dict[int, float]:
    """`alone` in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.gpu", "--alone", str(folder), "--batches", ",".join(map(str, batches))]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    (line,) = (line for line in answer.splitlines() if line.startswith("RESULT"))
    found = {int(batch): ms for batch, ms in json.loads(line.removeprefix("RESULT")).items()}
    print(f"{folder.name} alone: {found} ms ({time.perf_counter() - start:.0f} s in all)", flush=True)
    return found


def write(batches: list[int], single: dict[str, dict[int, float]], pair: dict[int, Any], output: Path) -> None:
    """Times the kernels, prints the table and writes the results."""
    import torch

    from benchmarks.fused import time_fused, time_read, time_torch

    rows = []
    print(f"{'batch':>6}{'base':>8}{'teacher':>9}{'pair':>8}{'ratio':>7}{'solve':>8}{'top-p':>8}{'read':>8}{'torch':>8}"
          f"{'tokens/s':>10}")  # fmt: skip
    for batch in batches:
        base, teacher, ms = single["base"][batch], single["teacher"][batch], pair[batch][0]
        row = {
            "batch": batch,
            "base_ms": base,
            "teacher_ms": teacher,
            "pair_ms": ms,
            "solve_ms": time_fused(batch, constrained=False),
            "solve_constrained_ms": time_fused(batch, constrained=True),
            "read_ms": time_read(batch, torch.bfloat16),
            "torch_solve_ms": time_torch(batch, constrained=False),
            "tokens_per_s": 1e3 * batch / ms,
            "teacher_tokens_per_s": 1e3 * batch / teacher,
            "pair_step_parts_ms": pair[batch][1],
        }
        rows.append(row)
        print(
            f"{batch:>6}{base:>8.2f}{teacher:>9.2f}{ms:>8.2f}{ms / (base + teacher):>7.2f}{row['solve_ms']:>8.3f}"
            f"{row['solve_constrained_ms']:>8.3f}{row['read_ms']:>8.3f}{row['torch_solve_ms']:>8.2f}"
            f"{row['tokens_per_s']:>10.0f}"
        )
    versions = {name: version(name) for name in ("vllm", "torch", "triton", "transformers")}
    output.write_text(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(),
                "versions": versions,
                "date": datetime.date.today().isoformat(),
                "rows": rows,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()

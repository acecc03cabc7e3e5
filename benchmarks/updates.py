"""New weights for the base of a vLLM pair on one GPU, while it draws: log q after an update, leaks, seconds, tokens/s.

    python -m benchmarks.updates                       all; writes benchmarks/results/updates.json
    python -m benchmarks.updates --bundled-only        the bundled pair alone; on a CPU too, to try the plumbing
    python -m benchmarks.updates --layers 2            smaller models for the timing

The bundled pair shows what is right: 64 requests get new weights midway ("recompute"), and a fresh local pair in
float32 scores their tokens. What rounding to bfloat16 and batches do to log q is measured on a fresh vLLM pair that
had the new weights from the start. The timing is of random weights in the shapes of Qwen3-4B and Qwen3-14B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from shutil import copyfile
from typing import Any

from benchmarks.common import COMMON, prompts, write_models, write_results

RESULTS = Path(__file__).parent / "results" / "updates.json"
REQUESTS, TOKENS, UPDATES = 64, 96, 200
TIMED_TOKENS, TIMED_UPDATES = 256, 8  # of each request, and in the course of all of them


def trained_base(folder: Path) -> Any:
    """The bundled base after a step of training, saved as a model folder."""
    import torch
    from transformers import AutoModelForCausalLM

    from midlogit.models.checkpoint import bundled

    model = AutoModelForCausalLM.from_pretrained(bundled("base"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copyfile(bundled("base") / name, folder / name)
    return model


def off_by(base: Any, asked: list[list[int]], done: list[Any], params: Any) -> list[list[float]]:
    """How far each token's log q is from that of a fresh local pair with this base, fed the same tokens."""
    from midlogit import Pair
    from midlogit.models.checkpoint import bundled

    texts = [ids + completion.token_ids for ids, completion in zip(asked, done, strict=True)]
    with Pair.local(base, bundled("teacher"), dtype="float32") as fresh:
        scores = fresh.score(texts, params)
    return [
        [abs(a - b) for a, b in zip(c.diagnostics.logprobs, s.diagnostics.logprobs[-TOKENS:], strict=True)]
        for c, s in zip(done, scores, strict=True)
    ]  # fmt: skip


def teacher_hits(pair: Any) -> list[int]:
    """Counts the prompt tokens that the teacher takes from its prefix cache, from now on."""
    manager = pair.engine.cores[1]._scheduler.kv_cache_manager
    computed, hits = manager.get_computed_blocks, []

    def counted(*arguments: Any) -> Any:
        found = computed(*arguments)
        hits.append(found[1])
        return found

    manager.get_computed_blocks = counted
    return hits


def update_midway(pair: Any, asked: list[list[int]], params: Any, weights: Any) -> list[Any]:
    """Completions of requests that get new weights when a third of the first one's tokens is drawn."""
    requests = pair.prepare(asked, params, _reading(), stream=True)
    batch, reached = pair.start(requests), threading.Event()
    done: list[Any] = []

    def collect() -> None:
        while not batch.is_over:
            event = batch.poll(0.1)
            if hasattr(event, "finish_reason") and hasattr(event, "token_ids"):
                done.append(event)
            elif event is not None and event.position == TOKENS // 3:
                reached.set()

    collector = threading.Thread(target=collect)
    collector.start()
    reached.wait()
    pair.update_base(weights, version="new")
    collector.join()
    return sorted(done, key=lambda completion: completion.index)


def check_bundled(speculation: Any) -> dict[str, Any]:
    """What an update midway does to log q, to the teacher's cache, to blocks and to memory."""
    import torch

    from midlogit import Pair, SamplingParams
    from midlogit.models.checkpoint import bundled

    params = SamplingParams.preset("exploratory", max_tokens=TOKENS, seed=1, ignore_eos=True)
    asked = [[300 + (37 * n + 11 * i) % 3000 for i in range(48)] for n in range(REQUESTS)]
    on_gpu = torch.cuda.is_available()
    options = {"max_num_seqs": REQUESTS, "max_model_len": 256, "block_size": 32, "speculation": speculation,
               "dtype": "bfloat16" if on_gpu else "float32", "enforce_eager": not on_gpu}  # fmt: skip
    row: dict[str, Any] = {"speculation": speculation}

    with tempfile.TemporaryDirectory() as scratch:
        new = trained_base(Path(scratch))
        weights = [
            (n, w.detach().to("cuda" if on_gpu else "cpu")) for n, w in new.named_parameters()
        ]
        with Pair.vllm(bundled("base"), bundled("teacher"), **options) as pair:
            done = update_midway(pair, asked, params, weights)
            hits = teacher_hits(pair)
            pair.generate(asked, params, progress=False)
            row["teacher_hits"] = sum(hits)

            sizes = []
            stream = pair.stream(asked[0], params)
            for _ in range(UPDATES):
                pair.update_base(weights)
                sizes.append(torch.cuda.memory_allocated() if on_gpu else 0)
            stream.close()
            pair.pause("wait")
            row["bytes_grown"] = sizes[-1] - sizes[10]
            row["blocks_held"] = [core.blocks - core.free_blocks for core in pair.engine.cores]

        with Pair.vllm(Path(scratch), bundled("teacher"), **options) as pair:
            fresh = pair.generate(asked, params, progress=False)
        starts = [completion.weight_versions[0].start for completion in done]
        by_new = off_by(Path(scratch), asked, done, params)
        by_old = off_by(bundled("base"), asked, done, params)
        rounding = off_by(Path(scratch), asked, fresh, params)

    def mean(parts: list[list[float]]) -> float:
        return statistics.mean(x for part in parts for x in part)

    assert all(0 < start < TOKENS for start in starts), starts
    row["rounding"] = mean(rounding)
    row["after_to_new"] = mean([o[s:] for o, s in zip(by_new, starts, strict=True)])
    row["after_to_old"] = mean([o[s:] for o, s in zip(by_old, starts, strict=True)])
    row["before_to_old"] = mean([o[:s] for o, s in zip(by_old, starts, strict=True)])
    row["before_to_new"] = mean([o[:s] for o, s in zip(by_new, starts, strict=True)])
    row["is_right"] = (
        row["after_to_new"] < 1.5 * row["rounding"] + 1e-4 < row["after_to_old"] / 3
        and row["teacher_hits"] > 0
        and row["blocks_held"] == [0, 0]
        and row["bytes_grown"] < 2**20
    )
    return row


def time_updates(layers: int | None) -> dict[str, Any]:
    """Seconds per update and tokens/s with and without updates, of shapes as large as they are used."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from midlogit import Pair, SamplingParams

    with tempfile.TemporaryDirectory() as scratch:
        folders = write_models(Path(scratch), layers)
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folders["base"])
            shapes = {
                name: weight.shape
                for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()
            }
        options = {**COMMON, "max_num_seqs": REQUESTS, "gpu_memory_utilization": 0.8}
        with Pair.vllm(folders["base"], folders["teacher"], **options) as pair:
            torch.manual_seed(0)
            weights = [
                (name, torch.ones(shape, dtype=torch.bfloat16, device="cuda") if "norm" in name
                 else 0.02 * torch.randn(shape, dtype=torch.bfloat16, device="cuda"))
                for name, shape in shapes.items()
            ]  # fmt: skip
            params = SamplingParams(max_tokens=TIMED_TOKENS, ignore_eos=True, seed=1)

            def seconds(updates: int) -> float:
                start = time.perf_counter()
                batch = pair.start(pair.prepare(prompts(REQUESTS), params, _reading()))
                for _ in range(updates):
                    time.sleep(baseline / (updates + 1))
                    pair.update_base(weights)
                for completion in batch:
                    if completion.error:
                        raise RuntimeError(completion.error)
                return time.perf_counter() - start

            baseline = 0.0
            seconds(0)
            baseline = seconds(0)
            found = {"tokens_per_s": REQUESTS * TIMED_TOKENS / baseline}
            with_updates = seconds(TIMED_UPDATES)
            found["tokens_per_s_with_updates"] = REQUESTS * TIMED_TOKENS / with_updates
            found["updates"] = TIMED_UPDATES
            idle = []
            for _ in range(20):
                start = time.perf_counter()
                pair.update_base(weights)
                torch.cuda.synchronize()
                idle.append(time.perf_counter() - start)
            found["seconds_per_update"] = statistics.median(idle)
            found["bytes"] = sum(w.numel() * w.element_size() for _, w in weights)
            return found


def _reading() -> Any:
    from midlogit.requests.prompts import Reading

    return Reading()


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--bundled-only", action="store_true")
    options.add_argument("--layers", type=int, help="layers of both timed models")
    options.add_argument("--output", type=Path, default=RESULTS)
    chosen = options.parse_args()

    rows = []
    for speculation in ("off", 3):
        rows.append(check_bundled(speculation))
        print(json.dumps(rows[-1]), flush=True)
    if not chosen.bundled_only:
        import torch

        rows.append(time_updates(chosen.layers))
        print(json.dumps(rows[-1]), flush=True)
        write_results(chosen.output, torch.cuda.get_device_name(), rows)
    if not all(row.get("is_right", True) for row in rows):
        raise SystemExit("WRONG: see is_right above.")


if __name__ == "__main__":
    main()

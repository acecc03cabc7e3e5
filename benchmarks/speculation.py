"""Tokens a second on one GPU with drafts and without, and of the teacher alone, in one run.

    python -m benchmarks.speculation           all batch sizes; writes benchmarks/results/speculation_gpu.json
    python -m benchmarks.speculation --layers 2 --batches 1,8       smaller models, to try the plumbing

The models have random weights in the shapes of Qwen3-4B and Qwen3-14B, so what they would accept of each other says
nothing: acceptance is simulated. A draft stands with probability 0.88, the real pair's (docs/speculation.md), whatever
was drawn; the forwards, the drafts, the solver and the draw are the real ones. Each figure is what the steps of a full
batch gave within a window of some seconds; lock-step is γ = 0 on the same engine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.gpu import COMMON, prompts, write_models

RESULTS = Path(__file__).parent / "results" / "speculation_gpu.json"
ACCEPTANCE = 0.88
WARM, WINDOW = 1.5, 4.0  # seconds
MOST_TOKENS = 1800


class Chance:
    """Evenly spread numbers in [0, 1), so that few rounds show the acceptance that is meant."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self) -> float:
        self._count += 1
        return math.modf(self._count * 0.5 * (math.sqrt(5) - 1))[0]


def simulate_acceptance() -> None:
    """Has drafts stand with probability ACCEPTANCE."""
    from midlogit.engines.vllm.engine import Flight

    chance = Chance()

    def tokens(flight: Flight) -> dict[str, list[int]]:
        drawn, count = flight.drawing.token_ids(), len(flight.keys)
        found = {}
        for n, key in enumerate(flight.keys):
            stood = 0
            while stood < flight.drafts and chance() < ACCEPTANCE:
                stood += 1
            found[key] = drawn[n : (stood + 1) * count : count]
        return found

    Flight.tokens = tokens  # type: ignore[method-assign]


class Steps:
    """Notes of each step of a full batch: when its tokens were there, and how many."""

    def __init__(self, engine: Any) -> None:
        self.batch = 0
        self.notes: list[tuple[float, int]] = []
        measure = engine._measure

        def noted(flight: Any, tokens: Mapping[str, list[int]]) -> None:
            measure(flight, tokens)
            if len(tokens) == self.batch:
                self.notes.append((time.perf_counter(), sum(map(len, tokens.values()))))

        engine._measure = noted

    def tokens_per_s(self) -> float:
        """Over the last WINDOW seconds."""
        until = self.notes[-1][0]
        notes = [note for note in self.notes if note[0] >= until - WINDOW]
        return sum(count for _, count in notes[1:]) / (notes[-1][0] - notes[0][0])


def measure(pair: Any, steps: Steps, batch: int, asked: int | str) -> tuple[float, dict[str, Any]]:
    """Tokens a second of a batch, and the statistics of its drafts."""
    from midlogit import SamplingParams
    from midlogit.engines.vllm.engine import DRAFTS
    from midlogit.sampling.drafting import Drafting

    engine = pair._engine
    engine.drafting = Drafting(asked, DRAFTS)
    steps.batch, steps.notes = batch, []
    params = SamplingParams(max_tokens=MOST_TOKENS, ignore_eos=True, seed=1)
    running = pair.as_completed(prompts(batch), params)
    while not steps.notes or steps.notes[-1][0] - steps.notes[0][0] < WARM + WINDOW:
        time.sleep(0.1)
    ended = running.stop()
    if any(completion.error for completion in ended):
        raise RuntimeError(ended[0].error)
    return steps.tokens_per_s(), engine.drafting.statistics()


def together(folders: Mapping[str, Path], batches: list[int], asked: list[int | str], speculation: str) -> list[Any]:
    """(batch, γ as asked for, tokens a second, statistics) of one pair."""
    from midlogit import Pair

    found = []
    with Pair.vllm(folders["base"], folders["teacher"], speculation=speculation, **COMMON) as pair:
        steps = Steps(pair._engine)
        for batch in batches:
            for drafts in asked:
                rate, statistics = measure(pair, steps, batch, drafts)
                found.append((batch, drafts, rate, statistics))
                print(
                    f"batch {batch}, drafts {drafts}: {rate:.0f} tokens/s; acceptance {statistics['acceptance']},"
                    f" in use {statistics['drafts_in_use']}",
                    flush=True,
                )
    return found


def main() -> None:
    from midlogit.engines.vllm.engine import DRAFTS

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--batches", default="1,8,64,256")
    options.add_argument("--layers", type=int, help="layers of both models, to try the plumbing")
    options.add_argument("--output", type=Path, default=RESULTS)
    chosen = options.parse_args()
    batches = [int(batch) for batch in chosen.batches.split(",")]
    simulate_acceptance()
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_models(Path(scratch), chosen.layers)
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--alone",
            str(folders["teacher"]),
            "--batches",
            chosen.batches,
        ]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        (line,) = (line for line in answer.splitlines() if line.startswith("RESULT"))
        alone = {int(batch): 1e3 * int(batch) / ms for batch, ms in json.loads(line.removeprefix("RESULT")).items()}
        print(f"teacher alone: {alone} tokens/s", flush=True)
        found = together(folders, batches, [*DRAFTS, "auto"], "auto")
    rates = {(batch, drafts): rate for batch, drafts, rate, _ in found}
    rows = [
        {
            "batch": batch,
            "gamma": drafts,
            "acceptance": statistics["acceptance"],
            "simulated": True,
            "tokens_per_s": rate,
            "lockstep_tokens_per_s": rates[batch, 0],
            "teacher_tokens_per_s": alone[batch],
            "drafts_in_use": statistics["drafts_in_use"],
        }
        for batch, drafts, rate, statistics in found
    ]
    print(f"{'batch':>6}{'γ':>6}{'tokens/s':>10}{'/lock-step':>11}{'/teacher':>9}")
    for row in rows:
        rate = row["tokens_per_s"]
        print(
            f"{row['batch']:>6}{row['gamma']:>6}{rate:>10.0f}{rate / row['lockstep_tokens_per_s']:>11.2f}"
            f"{rate / row['teacher_tokens_per_s']:>9.2f}"
        )
    import torch

    document = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("vllm", "torch", "triton", "transformers")},
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    chosen.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

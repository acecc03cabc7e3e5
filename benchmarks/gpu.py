"""Step times on one GPU: each model alone in vLLM, the pair, and the solve and draw, in one run.

    python -m benchmarks.gpu                   all batch sizes; writes benchmarks/results/gpu.json
    python -m benchmarks.gpu --drafts FILE     and tokens/s with drafts (benchmarks/speculation.py) into FILE
    python -m benchmarks.gpu --layers 2 --batches 1,8      smaller models, to try the plumbing

The models have random weights in the shapes of Qwen3-4B and Qwen3-14B. Each model alone is vLLM's own `LLM.generate`
in a process of its own, with its defaults. A step's time is the difference between completions of two lengths, over the
difference of the lengths, so prompts do not count; every number is a median of repeats. The parts of a step are the
same differences of the same two completions, so they add up to no more than the step.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import (
    COMMON,
    Parts,
    checked_parts,
    parser,
    step_ms,
    times_alone,
    write_models,
    write_results,
)
from benchmarks.speculation import measure_all

RESULTS = Path(__file__).parent / "results" / "gpu.json"


def time_pair(pair: Any, batches: list[int]) -> dict[int, tuple[float, dict[str, float]]]:
    """Step times of the pair in lock-step, and where the engine's thread spent them (milliseconds per step)."""
    from midlogit import SamplingParams
    from midlogit.engines.vllm.options import draft_length

    engine, total = pair.engine, Counter()
    engine.lockstep.draft_length = draft_length("off")
    engine.lockstep.observer = lambda record: total.update(record.seconds)

    def generate(asked: list[list[int]], tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1)
        for completion in pair.generate(asked, params, progress=False):
            if len(completion.token_ids) != tokens:
                raise RuntimeError(completion.error)

    def spent() -> Parts:
        while engine.num_live:  # the last step tells of itself after its completions
            time.sleep(1e-3)
        return total

    found = {}
    for batch in batches:
        ms, parts_ms = step_ms(generate, batch, spent)
        found[batch] = ms, checked_parts(parts_ms, ms, f"batch {batch}")
        parts = ", ".join(f"{part} {t:.2f}" for part, t in found[batch][1].items())
        print(f"batch {batch}: {ms:.2f} ms per step; {parts}", flush=True)

    engine.lockstep.observer = None
    return found


def write(
    batches: list[int], alone: dict[str, dict[int, float]], pair: dict[int, Any], output: Path
) -> None:
    """Times the kernels, prints the table and writes the results."""
    import torch

    from benchmarks.fused import time_fused, time_read, time_torch

    rows = []
    print(f"{'batch':>6}{'base':>8}{'teacher':>9}{'pair':>8}{'ratio':>7}{'solve':>8}{'top-p':>8}{'read':>8}{'torch':>8}"
          f"{'tokens/s':>10}")  # fmt: skip
    for batch in batches:
        base, teacher, ms = alone["base"][batch], alone["teacher"][batch], pair[batch][0]
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
    write_results(output, torch.cuda.get_device_name(), rows)


def main() -> None:
    from midlogit import Pair

    options = parser(__doc__, RESULTS)
    options.add_argument(
        "--drafts", type=Path, help="also run benchmarks/speculation.py's part and write it there"
    )
    chosen = options.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folders = write_models(Path(scratch), chosen.layers)
        alone = times_alone(folders, chosen.batches)

        start = time.perf_counter()
        with Pair.vllm(folders["base"], folders["teacher"], **COMMON) as pair:
            print(f"pair: {time.perf_counter() - start:.0f} s to open", flush=True)
            found = time_pair(pair, chosen.batches)
            write(chosen.batches, alone, found, chosen.output)
            if chosen.drafts:
                measure_all(pair, alone["teacher"], chosen.batches, chosen.drafts)


if __name__ == "__main__":
    main()

"""Step times with tensor parallelism: each model alone in vLLM, the pair, and the pair with drafts, in one run.

    python -m benchmarks.tp --ranks 2          all batch sizes; writes benchmarks/results/tp.json
    python -m benchmarks.tp --ranks 1,2 --layers 2 --batches 1,8      smaller models, to try the plumbing

Models, step times and the simulated acceptance are those of benchmarks/gpu.py and benchmarks/speculation.py: random
weights in the shapes of Qwen3-4B and Qwen3-14B, and drafts that are accepted with probability 0.85, alike on all ranks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    COMMON,
    batch_sizes,
    parser,
    step_ms,
    times_alone,
    write_models,
    write_results,
)
from benchmarks.speculation import WARM, SimulatedAcceptance, Steps, run

if TYPE_CHECKING:
    from midlogit.engines.vllm.lockstep import Lockstep

RESULTS = Path(__file__).parent / "results" / "tp.json"
GAMMA = 5


def draft(lockstep: Lockstep, gamma: int) -> None:
    """Has a rank draft `gamma` tokens a round, of which it accepts as many as a real pair would."""
    from midlogit.engines.vllm.options import draft_length

    lockstep.draft_length, lockstep.accept = draft_length(gamma), SimulatedAcceptance()


def time_pair(pair: Any, batches: list[int]) -> Iterator[tuple[int, float, float]]:
    """(batch size, milliseconds per step in lock-step, tokens per second with drafts) of each batch size."""
    # The module by name: the other ranks cannot load a function of the main module.
    from benchmarks import tp
    from midlogit import SamplingParams

    engine, steps = pair.engine, Steps()
    engine.lockstep.observer = steps.note

    def generate(asked: list[list[int]], tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1)
        for completion in pair.generate(asked, params, progress=False):
            if len(completion.token_ids) != tokens:
                raise RuntimeError(completion.error)

    for batch in batches:
        engine.between_steps(lambda: engine.on_every_rank(tp.draft, 0))
        ms, _ = step_ms(generate, batch)
        engine.between_steps(lambda: engine.on_every_rank(tp.draft, GAMMA))
        run(pair, steps, batch, lambda: steps.seconds >= WARM + steps.window)
        yield batch, ms, steps.tokens_per_s()


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main() -> None:
    from midlogit import Pair

    options = parser(__doc__, RESULTS)
    options.add_argument("--ranks", type=batch_sizes, default="2", help="numbers of GPUs")
    chosen = options.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_models(Path(scratch), chosen.layers)
        for ranks in chosen.ranks:
            alone = times_alone(folders, chosen.batches, ranks)
            models = folders["base"], folders["teacher"]
            options_of_pair = {**COMMON, "tensor_parallel_size": ranks, "speculation": GAMMA}
            with Pair.vllm(*models, **options_of_pair) as pair:
                for batch, ms, tokens_per_s in time_pair(pair, chosen.batches):
                    base_ms, teacher_ms = alone["base"][batch], alone["teacher"][batch]
                    row = {
                        "tp": ranks,
                        "batch": batch,
                        "base_ms": base_ms,
                        "teacher_ms": teacher_ms,
                        "pair_ms": ms,
                        "gamma": GAMMA,
                        "gamma_tokens_per_s": tokens_per_s,
                        "teacher_tokens_per_s": 1e3 * batch / teacher_ms,
                    }
                    print(row, f"over the sum: {ms / (base_ms + teacher_ms):.2f}", flush=True)
                    rows.append(row)
                    write_results(chosen.output, device_name(), rows)


if __name__ == "__main__":
    main()

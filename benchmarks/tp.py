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
from typing import TYPE_CHECKING, Any, NamedTuple

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


class PairTimes(NamedTuple):
    """Times of the pair with one batch size.

    Attributes:
        batch: sequences. step_ms: milliseconds per step in lock-step. parts_ms: of rank 0's thread, by part of a step.
        tokens_per_s: with drafts.
    """

    batch: int
    step_ms: float
    parts_ms: dict[str, float]
    tokens_per_s: float


def time_pair(pair: Any, batches: list[int]) -> Iterator[PairTimes]:
    """Times each batch size, in lock-step and with drafts."""
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

    def sample_window(batch: int) -> None:
        run(pair, steps, batch, lambda: steps.seconds >= WARM + steps.window)

    for batch in batches:
        engine.between_steps(lambda: engine.on_every_rank(tp.draft, 0))
        ms, _ = step_ms(generate, batch)
        sample_window(batch)
        parts_ms = steps.parts_ms(f"batch {batch}")
        engine.between_steps(lambda: engine.on_every_rank(tp.draft, GAMMA))
        sample_window(batch)
        yield PairTimes(batch, ms, parts_ms, steps.tokens_per_s())


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
                for batch, ms, parts_ms, tokens_per_s in time_pair(pair, chosen.batches):
                    base_ms, teacher_ms = alone["base"][batch], alone["teacher"][batch]
                    row = {
                        "tp": ranks,
                        "batch": batch,
                        "base_ms": base_ms,
                        "teacher_ms": teacher_ms,
                        "pair_ms": ms,
                        "pair_step_parts_ms": parts_ms,
                        "gamma": GAMMA,
                        "gamma_tokens_per_s": tokens_per_s,
                        "teacher_tokens_per_s": 1e3 * batch / teacher_ms,
                    }
                    print(row, f"over the sum: {ms / (base_ms + teacher_ms):.2f}", flush=True)
                    rows.append(row)
                    write_results(chosen.output, device_name(), rows)


if __name__ == "__main__":
    main()

"""Tokens per second on one GPU with drafts and without, and of the teacher alone, in one run.

    python -m benchmarks.speculation           all batch sizes; writes benchmarks/results/speculation_gpu.json
    python -m benchmarks.speculation --layers 2 --batches 1,8       smaller models, to try the plumbing

The models have random weights in the shapes of Qwen3-4B and Qwen3-14B, so what they would accept of each other says
nothing: acceptance is simulated. A draft is accepted with probability 0.85, as often as a real pair's (0.83 to 0.86,
docs/speculation.md), whatever was sampled; the forward passes, the drafts, the solver and the draw are the real ones.

Each figure is what the steps of a full batch gave within a window of three seconds, nine for one sequence. The window
begins two seconds after the first step, when texts are about as long for every γ; "auto" has tried several γ on two
batches before. Lock-step is γ = 0 on the same engine. The parts of a step are of the same window.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    COMMON,
    checked_parts,
    parser,
    prompts,
    times_alone,
    write_models,
    write_results,
)

if TYPE_CHECKING:
    from torch import Tensor

    from midlogit.engines.vllm.observer import StepRecord

RESULTS = Path(__file__).parent / "results" / "speculation_gpu.json"
ACCEPTANCE = 0.85
SETTLING, SETTLED = (
    2,
    40,
)  # batches on which "auto" tries several γ before its time begins, and rounds of each
WARM, WINDOW, WINDOW_OF_ONE = (
    2.0,
    3.0,
    7.0,
)  # seconds; one sequence has few rounds in each, and they differ more
MAX_TOKENS = 1800
GAMMAS: tuple[int | str, ...] = (0, 3, 5, "auto")


def fates() -> Iterator[bool]:
    """Whether the next verified draft is accepted: shuffled hundreds, so that few rounds show what is meant."""
    shuffle = random.Random(1).shuffle
    while True:
        hundred = [n < 100 * ACCEPTANCE for n in range(100)]
        shuffle(hundred)
        yield from hundred


class SimulatedAcceptance:
    """Accepts drafts with probability ACCEPTANCE, and bonus tokens always; `Lockstep.accept` calls it."""

    def __init__(self) -> None:
        self._fates = fates()

    def __call__(
        self, drafted_PN: Tensor, sampled_PN: Tensor, bonus_sequences: Sequence[int]
    ) -> Tensor:
        from midlogit.decide.transfer import to_device

        positions, sequences = sampled_PN.shape
        accepted_N = [int(n in bonus_sequences) for n in range(sequences)]
        for n in range(sequences):
            while accepted_N[n] < positions and next(self._fates):
                accepted_N[n] += 1
        return to_device(accepted_N, sampled_PN.device)


class Steps:
    """Records of the steps of one batch, as `Lockstep.observer` gets them."""

    def __init__(self) -> None:
        self.batch = 0
        self.records: list[StepRecord] = []

    def begin(self, batch: int) -> None:
        self.batch, self.records = batch, []

    def note(self, record: StepRecord) -> None:
        """Keeps a step from the first full batch on."""
        if self.records or record.batch_size == self.batch:
            self.records.append(record)

    @property
    def full(self) -> list[StepRecord]:
        """Steps of the full batch."""
        return [record for record in self.records if record.batch_size == self.batch]

    @property
    def window(self) -> float:
        return WINDOW_OF_ONE if self.batch == 1 else WINDOW

    @property
    def seconds(self) -> float:
        """Since the first step."""
        full = self.full
        return full[-1].time - full[0].time if full else 0.0

    def tokens_per_s(self) -> float:
        """Over the window's last seconds."""
        records = self._in_window()
        return sum(record.num_tokens for record in records[1:]) / (
            records[-1].time - records[0].time
        )

    def rounds(self) -> dict[int, dict[str, float]]:
        """Rounds within the window by γ: how many, and what they took (milliseconds)."""
        took = defaultdict(list)
        for before, record in pairwise(self._in_window()):
            took[record.num_drafts].append(1e3 * (record.time - before.time))
        return {
            drafts: {
                "rounds": len(ms),
                "mean_ms": round(fmean(ms), 2),
                "median_ms": round(median(ms), 2),
            }
            for drafts, ms in sorted(took.items())
        }

    def parts_ms(self, name: str) -> dict[str, float]:
        """Milliseconds of a step within the window by part; none if they are more than the step."""
        first, *rest = self._in_window()
        last = rest[-1]
        spent: Counter[str] = Counter()
        for record in self.records:
            if first.time < record.time <= last.time:
                spent.update(record.seconds)

        scale = 1e3 / len(rest)
        parts_ms = {part: scale * seconds for part, seconds in spent.items()}
        return checked_parts(parts_ms, scale * (last.time - first.time), name)

    def _in_window(self) -> list[StepRecord]:
        full = self.full
        return [record for record in full if record.time >= full[-1].time - self.window]


def run(pair: Any, steps: Steps, batch: int, enough: Callable[[], bool]) -> None:
    """Samples a batch until its steps are enough."""
    from midlogit import SamplingParams

    steps.begin(batch)
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, seed=1)
    running = pair.as_completed(prompts(batch), params)
    latest = time.monotonic() + 60
    while not enough():
        if time.monotonic() > latest:
            raise RuntimeError(
                f"{batch} sequences ended, or were preempted, before they were timed"
            )
        time.sleep(0.1)

    ended = running.stop()
    if any(completion.error for completion in ended):
        raise RuntimeError(ended[0].error)


def measure(pair: Any, steps: Steps, batch: int, gamma: int | str) -> tuple[float, dict[str, Any]]:
    """Tokens per second of a batch, and the statistics of its drafts."""
    from midlogit.engines.vllm.options import draft_length

    pair.engine.lockstep.draft_length = draft_length(gamma)
    for _ in range(SETTLING if gamma == "auto" else 0):
        run(pair, steps, batch, lambda: len(steps.full) >= SETTLED)
    run(pair, steps, batch, lambda: steps.seconds >= WARM + steps.window)
    return steps.tokens_per_s(), pair.engine.lockstep.draft_length.statistics()


def measure_all(
    pair: Any, teacher_ms: Mapping[int, float], batches: list[int], output: Path
) -> None:
    """Measures every batch size with every γ, prints the table and writes the results.

    Args:
        teacher_ms: milliseconds per step of the teacher alone, by batch size.
    """
    import torch

    steps = Steps()
    engine = pair.engine.lockstep
    engine.accept, engine.observer = SimulatedAcceptance(), steps.note
    rows: list[dict[str, Any]] = []
    print(
        f"{'batch':>6}{'γ':>6}{'tokens/s':>10}{'/lock-step':>11}{'/teacher':>9}{'acceptance':>11}  rounds by γ"
    )
    for batch in batches:
        lockstep = 0.0
        for gamma in GAMMAS:
            rate, statistics = measure(pair, steps, batch, gamma)
            parts_ms = steps.parts_ms(f"batch {batch}, γ = {gamma}")
            lockstep = rate if gamma == 0 else lockstep
            alone = 1e3 * batch / teacher_ms[batch]
            # In lock-step, what was counted is a round of the batch before.
            acceptance = None if gamma == 0 else statistics["acceptance"]
            rows.append(
                {
                    "batch": batch,
                    "gamma": gamma,
                    "acceptance": acceptance,
                    "simulated": True,
                    "tokens_per_s": rate,
                    "lockstep_tokens_per_s": lockstep,
                    "teacher_tokens_per_s": alone,
                    "rounds_by_gamma": steps.rounds(),
                    "step_parts_ms": parts_ms,
                }
            )
            print(
                f"{batch:>6}{gamma:>6}{rate:>10.0f}{rate / lockstep:>11.2f}{rate / alone:>9.2f}"
                f"{acceptance or 0:>11.3f}  {steps.rounds()}",
                flush=True,
            )
            print(
                " " * 12 + ", ".join(f"{part} {ms:.2f}" for part, ms in parts_ms.items()),
                flush=True,
            )
        write_results(output, torch.cuda.get_device_name(), rows)


def main() -> None:
    from midlogit import Pair

    options = parser(__doc__, RESULTS)
    chosen = options.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folders = write_models(Path(scratch), chosen.layers)
        teacher_ms = times_alone({"teacher": folders["teacher"]}, chosen.batches)["teacher"]
        with Pair.vllm(folders["base"], folders["teacher"], **COMMON) as pair:
            measure_all(pair, teacher_ms, chosen.batches, chosen.output)


if __name__ == "__main__":
    main()

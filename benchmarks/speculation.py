"""Tokens a second on one GPU with drafts and without, and of the teacher alone, in one run.

    python -m benchmarks.speculation           all batch sizes; writes benchmarks/results/speculation_gpu.json
    python -m benchmarks.speculation --layers 2 --batches 1,8       smaller models, to try the plumbing

The models have random weights in the shapes of Qwen3-4B and Qwen3-14B, so what they would accept of each other says
nothing: acceptance is simulated. A draft stands with probability 0.85, as often as a real pair's (0.83 to 0.86,
docs/speculation.md), whatever was drawn; the forwards, the drafts, the solver and the draw are the real ones.
Each figure is what the steps of a full batch gave within a window of three seconds, nine for one sequence, begun two
seconds after the first, when texts are about as long for every γ; "auto" has tried several γ on two batches before.
Lock-step is γ = 0 on the same engine. The parts of a step are of the same window.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from benchmarks.gpu import COMMON, Spent, alone_apart, checked_parts, prompts, since, watch, write_models

RESULTS = Path(__file__).parent / "results" / "speculation_gpu.json"
ACCEPTANCE = 0.85
SETTLING, SETTLED = 2, 40  # batches on which "auto" tries several γ before its time begins, and rounds of each
WARM, WINDOW, WINDOW_OF_ONE = 2.0, 3.0, 9.0  # seconds; one sequence has few rounds in each, and they differ more
MOST_TOKENS = 1800
ASKED: tuple[int | str, ...] = (0, 3, 5, "auto")


def fates() -> Iterator[bool]:
    """Whether the drafts that are looked at stand: shuffled hundreds, so that few rounds show what is meant."""
    shuffle = random.Random(1).shuffle
    while True:
        hundred = [n < 100 * ACCEPTANCE for n in range(100)]
        shuffle(hundred)
        yield from hundred


def simulate_acceptance(engine: Any) -> None:
    """Has drafts stand with probability ACCEPTANCE, and first tokens that were known always."""
    from midlogit.engines.vllm import engine as module

    fate, known = fates(), engine._known
    first: list[int] = []

    def noted(*args: Any) -> Any:
        found = known(*args)
        first[:] = found.sequences if found else []
        return found

    def standing(drawn_PN: Any, guessed_PN: Any) -> Any:
        places, sequences = drawn_PN.shape
        stood_N = [int(n in first) for n in range(sequences)]
        for n in range(sequences):
            while stood_N[n] < places and next(fate):
                stood_N[n] += 1
        return module.to_device(stood_N, drawn_PN.device)

    engine._known, module.standing = noted, standing


class Note(NamedTuple):
    """A step of a full batch: when its tokens were there, how many, its γ, and what all steps had spent by then."""

    at: float
    tokens: int
    drafts: int
    spent: dict[str, float]


class Steps:
    """Notes of the steps of one batch; `spent` is what `watch` adds up."""

    def __init__(self, engine: Any, spent: Spent) -> None:
        self.batch = 0
        self.notes: list[Note] = []
        measure = engine._measure

        def noted(flight: Any) -> None:
            measure(flight)
            if len(flight.keys) == self.batch:
                tokens = sum(map(len, flight.tokens().values()))
                self.notes.append(Note(time.perf_counter(), tokens, flight.drafts, dict(spent)))

        engine._measure = noted

    @property
    def window(self) -> float:
        return WINDOW_OF_ONE if self.batch == 1 else WINDOW

    @property
    def seconds(self) -> float:
        """Since the first step."""
        return self.notes[-1].at - self.notes[0].at if self.notes else 0.0

    def tokens_per_s(self) -> float:
        """Over the window's last seconds."""
        notes = self._in_window()
        return sum(note.tokens for note in notes[1:]) / (notes[-1].at - notes[0].at)

    def rounds(self) -> dict[int, dict[str, float]]:
        """Rounds within the window by γ: how many, and what they took (milliseconds)."""
        took = defaultdict(list)
        for before, note in pairwise(self._in_window()):
            took[note.drafts].append(1e3 * (note.at - before.at))
        return {
            drafts: {"rounds": len(ms), "mean_ms": round(fmean(ms), 2), "median_ms": round(median(ms), 2)}
            for drafts, ms in sorted(took.items())
        }

    def parts_ms(self, name: str) -> dict[str, float]:
        """What a step within the window spent in each part (milliseconds); none if they are more than the step."""
        first, *_, last = notes = self._in_window()
        scale = 1e3 / (len(notes) - 1)
        parts_ms = {part: scale * seconds for part, seconds in since(first.spent, last.spent).items()}
        return checked_parts(parts_ms, scale * (last.at - first.at), name)

    def _in_window(self) -> list[Note]:
        return [note for note in self.notes if note.at >= self.notes[-1].at - self.window]


def run(pair: Any, steps: Steps, batch: int, enough: Callable[[], bool]) -> None:
    """Samples a batch until its steps are enough."""
    from midlogit import SamplingParams

    steps.batch, steps.notes = batch, []
    params = SamplingParams(max_tokens=MOST_TOKENS, ignore_eos=True, seed=1)
    running = pair.as_completed(prompts(batch), params)
    latest = time.monotonic() + 60
    while not enough():
        if time.monotonic() > latest:
            raise RuntimeError(f"{batch} sequences ended, or were preempted, before they were timed")
        time.sleep(0.1)
    ended = running.stop()
    if any(completion.error for completion in ended):
        raise RuntimeError(ended[0].error)


def measure(pair: Any, steps: Steps, batch: int, asked: int | str) -> tuple[float, dict[str, Any]]:
    """Tokens a second of a batch, and the statistics of its drafts."""
    from midlogit.engines.draft_length import DraftLength
    from midlogit.engines.vllm.engine import DRAFTS

    draft_length = pair.engine.draft_length = DraftLength(asked, DRAFTS, reuses_bonus_row=True)
    for _ in range(SETTLING if asked == "auto" else 0):
        run(pair, steps, batch, lambda: len(steps.notes) >= SETTLED)
    run(pair, steps, batch, lambda: steps.seconds >= WARM + steps.window)
    return steps.tokens_per_s(), draft_length.statistics()


def measure_all(pair: Any, spent: Spent, teacher_ms: Mapping[int, float], batches: list[int], output: Path) -> None:
    """Measures every batch size with every γ, prints the table and writes the results.

    Args:
        spent: what the pair's steps spend. teacher_ms: what a step of the teacher alone takes.
    """
    import torch

    simulate_acceptance(pair.engine)
    steps = Steps(pair.engine, spent)
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("vllm", "torch", "triton", "transformers")},
        "date": datetime.date.today().isoformat(),
        "rows": [],
    }
    print(f"{'batch':>6}{'γ':>6}{'tokens/s':>10}{'/lock-step':>11}{'/teacher':>9}{'acceptance':>11}  rounds by γ")
    for batch in batches:
        lockstep = 0.0
        for drafts in ASKED:
            rate, statistics = measure(pair, steps, batch, drafts)
            parts_ms = steps.parts_ms(f"batch {batch}, γ = {drafts}")
            lockstep = rate if drafts == 0 else lockstep
            alone = 1e3 * batch / teacher_ms[batch]
            # In lock-step, what was counted is a round of the batch before.
            acceptance = None if drafts == 0 else statistics["acceptance"]
            row = {
                "batch": batch,
                "gamma": drafts,
                "acceptance": acceptance,
                "simulated": True,
                "tokens_per_s": rate,
                "lockstep_tokens_per_s": lockstep,
                "teacher_tokens_per_s": alone,
                "rounds_by_gamma": steps.rounds(),
                "step_parts_ms": parts_ms,
            }
            document["rows"].append(row)
            print(
                f"{batch:>6}{drafts:>6}{rate:>10.0f}{rate / lockstep:>11.2f}{rate / alone:>9.2f}"
                f"{acceptance or 0:>11.3f}  {steps.rounds()}",
                flush=True,
            )
            print(" " * 12 + ", ".join(f"{part} {ms:.2f}" for part, ms in parts_ms.items()), flush=True)
        output.write_text(json.dumps(document, indent=2) + "\n")


def main() -> None:
    from midlogit import Pair

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--batches", default="1,8,64,256")
    options.add_argument("--layers", type=int, help="layers of both models, to try the plumbing")
    options.add_argument("--output", type=Path, default=RESULTS)
    chosen = options.parse_args()
    batches = [int(batch) for batch in chosen.batches.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_models(Path(scratch), chosen.layers)
        teacher_ms = alone_apart(folders["teacher"], batches)
        with Pair.vllm(folders["base"], folders["teacher"], **COMMON) as pair:
            measure_all(pair, watch(pair), teacher_ms, batches, chosen.output)


if __name__ == "__main__":
    main()

"""Tokens per second of a real pair by batch size and γ, and of each model alone; knows no results file.

benchmarks/real_pair.py runs this module as a process of its own, which times one model alone.

All batches of a size answer the same chat prompts, each sequence to its last token (end tokens are masked). What counts
is the time in which the batch was full: from its first round on, so without the prompts. A model alone is vLLM's own
`LLM.generate`, timed as benchmarks/common.py does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.common import step_ms
from benchmarks.real_prompts import chats
from benchmarks.scoring import given_texts, time_prompts

if TYPE_CHECKING:
    from midlogit.engines.vllm.observer import StepRecord

SEQUENCES = {1: 4, 8: 16, 64: 128}  # per γ, by batch size
FEW_TOKENS = 64  # of a sequence with top_logprobs
TOP = 5


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        batches: sequences at once. gammas: numbers of drafts.
        num_texts: texts that are sampled and scored. tokens: of a timed sequence.
        scored_tokens: of a text whose scoring is timed.
    """

    batches: list[int]
    gammas: tuple[int | str, ...]
    num_texts: int
    tokens: int
    scored_tokens: int


class FullBatches:
    """Tokens and seconds of rounds of a full batch, as `Lockstep.observer` gets them."""

    def __init__(self, batch: int) -> None:
        self.batch, self.tokens, self.seconds = batch, 0, 0.0
        self._full: list[StepRecord] = []

    def note(self, record: StepRecord) -> None:
        if record.batch_size == self.batch:
            self._full.append(record)

    def end(self) -> None:
        """Ends one batch: counts from its first full round to its last."""
        first, *rest = self._full
        self.tokens += sum(record.num_tokens for record in rest)
        self.seconds += rest[-1].time - first.time
        self._full = []


def tokens_per_s(
    pair: Any, batch: int, gamma: int | str, sequences: int, **params: Any
) -> tuple[float, dict[str, Any]]:
    """Tokens per second of full batches, and the statistics of their drafts.

    Args:
        gamma: kernels are compiled, and "auto" has tried several, on the same batches before the time begins.
        sequences: how many are sampled in all, in batches of `batch`.
        params: of `SamplingParams.preset`.
    """
    from midlogit import SamplingParams
    from midlogit.engines.vllm.options import draft_length

    asked = SamplingParams.preset("balanced", ignore_eos=True, seed=1, **params)
    engine = pair.engine
    engine.lockstep.draft_length = draft_length(gamma)
    for settled in (False, True):
        full = FullBatches(batch)
        for start in range(0, sequences, batch):
            engine.lockstep.observer = full.note if settled else None
            found = pair.generate(chats(start, batch), asked, chat=True, progress=False)
            if any(completion.error for completion in found):
                raise RuntimeError(found[0].error)
            while engine.num_live:  # the last step tells of itself after its completions
                time.sleep(1e-3)
            if settled:
                full.end()

    engine.lockstep.observer = None
    return full.tokens / full.seconds, engine.lockstep.draft_length.statistics()


def rates(pair: Any, size: Size, teacher_ms: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each batch size and γ.

    Args:
        teacher_ms: milliseconds per step of the teacher alone, by batch size.
    """
    rows: list[dict[str, Any]] = []
    for batch in size.batches:
        lockstep = 0.0
        for gamma in size.gammas:
            sequences = SEQUENCES.get(batch, batch)
            rate, statistics = tokens_per_s(pair, batch, gamma, sequences, max_tokens=size.tokens)
            lockstep = rate if gamma == 0 else lockstep
            row = {
                "batch": batch,
                "gamma": gamma,
                "acceptance": statistics["acceptance"],
                "simulated": False,
                "tokens_per_s": rate,
                "lockstep_tokens_per_s": lockstep,
                "teacher_tokens_per_s": 1e3 * batch / teacher_ms[str(batch)],
                "acceptance_by_position": statistics["acceptance_by_position"],
                "drafts_in_use": statistics["drafts_in_use"],
            }
            rows.append(row)
            print(f"{batch:>6}{gamma:>6}{rate:>10.1f} tokens/s", flush=True)
    return rows


def cost_of_top(pair: Any, size: Size) -> list[dict[str, Any]]:
    """Tokens per second with `top_logprobs` and without, in lock-step and with drafts."""
    rows = []
    for batch in size.batches:
        for gamma in (0, size.gammas[-2]):
            tokens = min(FEW_TOKENS, size.tokens)
            plain, top = (
                tokens_per_s(pair, batch, gamma, batch, max_tokens=tokens, top_logprobs=n)[0]
                for n in (0, TOP)
            )
            rows.append(
                {"batch": batch, "gamma": gamma, "tokens_per_s": plain, "with_top_logprobs": top}
            )
    return rows


def time_alone(folder: str, size: Size, engine: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds per step of one model alone by batch size, and seconds of its prompts."""
    from vllm import LLM, SamplingParams

    llm = LLM(folder, enable_prefix_caching=False, **engine)

    def generate(asked: list[list[int]], tokens: int) -> None:
        params = SamplingParams(
            temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)

    found = time_prompts(llm, given_texts(size.num_texts, size.scored_tokens))
    return {"step_ms": {batch: step_ms(generate, batch)[0] for batch in size.batches}, **found}


def alone_apart(folder: str, size: Size, engine: dict[str, Any]) -> dict[str, Any]:
    """`time_alone` in a process of its own."""
    arguments = json.dumps([folder, size, engine])
    command = [sys.executable, "-m", "benchmarks.real_speed", arguments]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    (line,) = (line for line in answer.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arguments", help="folder, size and options of the engine, as JSON")
    folder, size, engine = json.loads(parser.parse_args().arguments)
    print("RESULT" + json.dumps(time_alone(folder, Size(*size), engine)))


if __name__ == "__main__":
    main()

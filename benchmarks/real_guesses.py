"""Guesses for the drafts of a real pair: tokens per second with and without, and of the teacher alone, in one run.

    python -m benchmarks.real_guesses --base FOLDER/qwen-0.5b --teacher FOLDER/qwen-1.5b
    python -m benchmarks.real_guesses --base FOLDER --teacher FOLDER --small      a few tokens, to try the plumbing

Three kinds of text: code edits, whose answers repeat most of their prompts; eight samples of each of a few chat
prompts; and chats, which repeat little, for what guesses cost. Nothing is simulated. Every setting answers the same
prompts twice, and the second time counts: "auto" and the times of rounds with guesses are known by then. What counts of
it is the time in which the batch was full, as in benchmarks/real_speed.py. Each kind is written to
benchmarks/results/guesses_gpu.json as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.real_pair import Results
from benchmarks.real_prompts import PROMPTS
from benchmarks.real_speed import FullBatches

if TYPE_CHECKING:
    from midlogit.engines.vllm.observer import StepRecord

RESULTS = Path(__file__).parent / "results" / "guesses_gpu.json"
SOURCES = (
    "core/draw.py",
    "core/rejection.py",
    "core/diagnostics.py",
    "core/nucleus.py",
    "decide/transfer.py",
    "engines/layout.py",
    "engines/vllm/steps.py",
    "engines/vllm/runner.py",
)
EDIT = (
    "Give every function of this module an argument `verbose: bool = False`, the last of all, and change nothing else."
    " Answer with the whole module and no other word.\n\n```python\n{}```"
)
SETTINGS = ((0, False), (5, False), (5, True), ("auto", False), ("auto", True))  # γ, guesses
SHORT = 16  # tokens of the texts whose time is taken off
REPEATS = 3


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        tokens: of a sequence. sequences: per batch size and kind. lines: of a module that is edited.
    """

    tokens: int
    sequences: int
    lines: int


FULL, SMALL = Size(256, 8, 80), Size(24, 2, 6)


class Kind(NamedTuple):
    """A kind of text: `batch` sequences at once are the answers of a group of prompts, n of each."""

    name: str
    batch: int
    n: int
    groups: list[list[str]]


class Counted(FullBatches):
    """Counts passes of the base and rounds with guesses, too."""

    def __init__(self, batch: int) -> None:
        super().__init__(batch)
        self.all_tokens = self.passes = self.guessed = self.rounds = self.stood = 0

    def note(self, record: StepRecord) -> None:
        from midlogit.engines.draft_length import MAX_DRAFTS

        super().note(record)
        if record.batch_size:
            is_guessed = record.num_drafts == MAX_DRAFTS
            self.all_tokens += record.num_tokens
            self.passes += record.batch_size * (2 if is_guessed else max(record.num_drafts, 1))
            self.guessed += is_guessed * record.batch_size
            self.rounds += record.batch_size
            self.stood += record.num_stood


def kinds(size: Size) -> list[Kind]:
    """What is asked, at batch 1 and 8."""
    import midlogit

    package = Path(midlogit.__file__).parent
    edits = [
        EDIT.format("".join((package / name).read_text().splitlines(True)[: size.lines]))
        for name in SOURCES
    ]
    few = max(size.sequences // 2, 1)
    return [
        Kind("edits", 1, 1, [[prompt] for prompt in edits[:few]]),
        Kind("edits", 8, 1, [edits]),
        Kind("samples", 8, 8, [[prompt] for prompt in PROMPTS[:few]]),
        Kind("chats", 1, 1, [[prompt] for prompt in PROMPTS[:few]]),
        Kind("chats", 8, 1, [PROMPTS[:8]]),
    ]


def answer(pair: Any, kind: Kind, tokens: int) -> tuple[Counted, list[list[int]]]:
    """Answers the prompts of a kind: what was counted, and the token ids."""
    from midlogit import SamplingParams

    asked = SamplingParams.preset("balanced", n=kind.n, ignore_eos=True, seed=1, max_tokens=tokens)
    counted, ids = Counted(kind.batch), []
    pair.engine.lockstep.observer = counted.note
    for group in kind.groups:
        found = pair.generate(group, asked, chat=True, progress=False)
        ids += [one.token_ids for one in found]
        while pair.engine.num_live:  # the last step tells of itself after its completions
            time.sleep(1e-3)
        counted.end()
    pair.engine.lockstep.observer = None
    return counted, ids


def measure(pair: Any, kind: Kind, size: Size, teacher_s: float) -> list[dict[str, Any]]:
    """A row for each setting.

    Args:
        teacher_s: tokens per second of the teacher alone, on the same prompts.
    """
    from midlogit.engines.vllm.options import draft_length

    rows, without = [], {}
    lockstep = pair.engine.lockstep
    for gamma, guesses in SETTINGS:
        lockstep.draft_length, lockstep.uses_guesses = draft_length(gamma), guesses
        answer(pair, kind, size.tokens)
        counted, ids = answer(pair, kind, size.tokens)
        without.setdefault(gamma, ids)
        rate = counted.tokens / counted.seconds
        rows.append(
            {
                "kind": kind.name,
                "batch": kind.batch,
                "gamma": gamma,
                "guesses": guesses,
                "tokens_per_s": rate,
                "teacher_tokens_per_s": teacher_s,
                "ratio_to_teacher": rate / teacher_s,
                "base_passes_per_token": counted.passes / counted.all_tokens,
                "guessed_share_of_rounds": counted.guessed / counted.rounds,
                "stood_per_guessed_round": counted.stood / max(counted.guessed, 1),
                "acceptance": lockstep.draft_length.statistics()["acceptance"],
                "sequences": len(ids),
                "same_as_without": sum(a == b for a, b in zip(ids, without[gamma], strict=True)),
            }
        )
    return rows


def time_teacher(folder: str, size: Size, engine: dict[str, Any]) -> list[float]:
    """Tokens per second of one model alone on the prompts of each kind, by vLLM's own `LLM.generate`."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    llm, tokenizer = LLM(folder, **engine), AutoTokenizer.from_pretrained(folder)

    def seconds(groups: Sequence[Sequence[str]], n: int, tokens: int) -> float:
        params = SamplingParams(
            temperature=1.0, n=n, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        for group in groups:
            chats = [[{"role": "user", "content": prompt}] for prompt in group]
            read = [
                tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False)
                for c in chats
            ]
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in read]
            llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
        return time.perf_counter() - start

    rates = []
    for kind in kinds(size):
        groups, n, short = kind.groups[:2], kind.n, min(SHORT, size.tokens // 2)
        seconds(groups, n, short)
        took = [seconds(groups, n, size.tokens) - seconds(groups, n, short) for _ in range(REPEATS)]
        sequences = n * sum(map(len, groups))
        rates.append(sequences * (size.tokens - short) / median(took))
    return rates


def time_apart(folder: str, size: Size, engine: dict[str, Any]) -> list[float]:
    """`time_teacher` in a process of its own."""
    arguments = json.dumps([folder, size, engine])
    command = [sys.executable, "-m", "benchmarks.real_guesses", "--alone", arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    (line,) = (line for line in output.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


def run(base: str, teacher: str, size: Size, engine: dict[str, Any], output: Path) -> None:
    """Measures all kinds."""
    from midlogit import Pair

    results = Results(output, [Path(folder).name for folder in (base, teacher)])
    alone = results.add("teacher_tokens_per_s", lambda: time_apart(teacher, size, engine))
    with Pair.vllm(base, teacher, **engine) as pair:
        for kind, teacher_s in zip(kinds(size), alone, strict=True):
            name = f"{kind.name}, batch {kind.batch}"
            results.add(name, partial(measure, pair, kind, size, teacher_s))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base")
    parser.add_argument("--teacher")
    parser.add_argument("--small", action="store_true", help="a few tokens, no CUDA graphs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.alone:
        folder, size, engine = json.loads(chosen.alone)
        print("RESULT" + json.dumps(time_teacher(folder, Size(*size), engine)))
        return

    engine = {"max_model_len": 1024 if chosen.small else 2048, "max_num_seqs": 32}
    engine |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.45, "enforce_eager": chosen.small}
    run(chosen.base, chosen.teacher, SMALL if chosen.small else FULL, engine, chosen.output)


if __name__ == "__main__":
    main()

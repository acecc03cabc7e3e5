"""What guesses cost the host, and how far they reach where a text is copied with changes; runs no model.

    python -m benchmarks.guesses_cpu

24 sequences of a prompt of 2,000 tokens get four tokens a round: copies of it, or tokens that never repeat. Then
modules of this package are "edited" (a parameter more everywhere, and a word after each "of"), and replayed as answers
to prompts that hold the module: rounds of two forward passes of the base in which all valid drafts are accepted.
Written to benchmarks/results/guesses_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.real_guesses import EDIT, SOURCES
from midlogit.engines.draft_length import DraftLength
from midlogit.engines.vllm.guesses import MAX_BATCH, Guesses

RESULTS = Path(__file__).parent / "results" / "guesses_cpu.json"
PROMPT, ROUNDS, PER_ROUND = 2000, 300, 4


def begin() -> tuple[Guesses, list[str]]:
    """A full batch of samples of one prompt."""
    guesses, keys = Guesses(), [str(n) for n in range(MAX_BATCH)]
    for key in keys:
        guesses.add(key, tuple(range(PROMPT)))
    return guesses, keys


def time_first_look() -> float:
    """Median milliseconds of the first look at the prompt."""
    seconds = []
    for _ in range(ROUNDS // 10):
        guesses, keys = begin()
        start = time.perf_counter()
        guesses.rates(keys)
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds)


def time_rounds(repeats: bool) -> float:
    """Median microseconds a sequence and round."""
    lengths = DraftLength(4, reuses_bonus_row=True)
    for _ in range(20):  # a γ whose time is known
        lengths.record_time(MAX_BATCH, 4, 0.02)
    guesses, keys = begin()
    seconds = []
    for n in range(0, ROUNDS * PER_ROUND, PER_ROUND):
        own = 0 if repeats else PROMPT
        tokens = [
            range(own * row + n, own * row + n + PER_ROUND) for row in range(1, MAX_BATCH + 1)
        ]
        start = time.perf_counter()
        for key, some in zip(keys, tokens, strict=True):
            guesses.append(key, some)
        if lengths.guesses_pay(guesses.rates(keys)):
            guesses.guesses(keys)
        seconds.append(time.perf_counter() - start)
    return 1e6 * median(seconds) / MAX_BATCH


def replay(prompt: list[int], answer: list[int]) -> int:
    """Rounds with guesses that an answer takes if every valid draft is accepted; others give two tokens."""
    guesses, rounds, done = Guesses(), 0, 0
    guesses.add("a", tuple(prompt))
    while done < len(answer):
        guesses.rates(["a"])
        (ahead,) = guesses.guesses(["a"])
        stood = 0
        while stood < len(ahead) and ahead[stood : stood + 1] == answer[done + 1 + stood :][:1]:
            stood += 1
        guesses.append("a", answer[done : done + 2 + stood])
        done, rounds = done + 2 + stood, rounds + 1
    return rounds


def replay_edits() -> dict[str, Any]:
    """Tokens of the edited modules, and what they take."""
    from tokenizers import Tokenizer

    import midlogit

    package = Path(midlogit.__file__).parent
    tokenizer = Tokenizer.from_file(str(package / "bundled" / "base" / "tokenizer.json"))
    tokens = rounds = 0
    for name in SOURCES:
        module = (package / name).read_text()
        edited = re.sub(r"\) ->", ", verbose: bool = False) ->", module).replace(" of ", " of all ")
        answer = tokenizer.encode(edited).ids
        tokens += len(answer)
        rounds += replay(tokenizer.encode(EDIT.format(module)).ids, answer)
    return {"tokens": tokens, "rounds": rounds, "base_passes_per_token": 2 * rounds / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    found = {
        "us_per_sequence_and_round": {"unlike": time_rounds(False), "copied": time_rounds(True)},
        "first_look_ms": time_first_look(),
        "edits": replay_edits(),
    }
    chosen.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

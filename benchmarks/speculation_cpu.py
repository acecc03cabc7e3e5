"""Tokens a second of lock-step and of drafting ahead, on a real pair on the CPU, one sequence at a time.

    python -m benchmarks.speculation_cpu --base FOLDER/qwen-0.5b --teacher FOLDER/qwen-1.5b

12 chat prompts, 64 tokens each. One process holds the weights once; for every prompt all numbers of drafts take their
turn, so that whatever else the machine does falls on all of them alike. Written to
benchmarks/results/speculation_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from benchmarks.local import PROMPTS, TOKENS, circumstances

DRAFTS = ("off", 2, 4, "auto")
PRESETS = ("balanced", "exploratory")
RESULTS = Path(__file__).parent / "results" / "speculation_cpu.json"


def measure(base: str, teacher: str, dtype: str, prompts: list[str]) -> list[dict]:
    """A row for each preset and number of drafts."""
    from midlogit import Pair, SamplingParams
    from midlogit.engines.draft_length import DraftLength

    rows = []
    with Pair.local(base, teacher, dtype=dtype, device="cpu", speculation="off") as pair:
        engine = pair.engine
        for preset in PRESETS:
            asked = SamplingParams.preset(preset, max_tokens=TOKENS, seed=1, ignore_eos=True)
            # One for each: "auto" learns from prompt to prompt.
            lengths = {drafts: DraftLength(drafts) for drafts in DRAFTS}
            seconds, texts = defaultdict(list), defaultdict(list)
            pair.generate(prompts[:1], asked, chat=True)
            for number, prompt in enumerate(prompts):
                turn = number % len(DRAFTS)
                for drafts in DRAFTS[turn:] + DRAFTS[:turn]:
                    engine.draft_length = lengths[drafts]
                    start = time.perf_counter()
                    (completion,) = pair.generate([prompt], asked, chat=True)
                    seconds[drafts].append(time.perf_counter() - start)
                    texts[drafts].append(completion.token_ids)
                print(
                    preset,
                    number,
                    {d: round(s[-1], 1) for d, s in seconds.items()},
                    file=sys.stderr,
                )
            for drafts in DRAFTS:
                found = lengths[drafts].statistics()
                rows.append(
                    {
                        "preset": preset,
                        "drafts": drafts,
                        "acceptance": found["acceptance"],
                        "drafts_in_use": found["drafts_in_use"],
                        "tokens_per_s": len(prompts) * TOKENS / sum(seconds[drafts]),
                        "ratio_to_lock_step": sum(seconds["off"]) / sum(seconds[drafts]),
                        "median_ratio": median(
                            a / b for a, b in zip(seconds["off"], seconds[drafts], strict=True)
                        ),
                        "same_tokens": sum(
                            a == b for a, b in zip(texts["off"], texts[drafts], strict=True)
                        ),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = {
        **circumstances(args.base, args.teacher, args.dtype),
        "prompts": args.prompts,
        "tokens": TOKENS,
        "rows": measure(args.base, args.teacher, args.dtype, PROMPTS[: args.prompts]),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["rows"]:
        print(
            f"{row['preset']:12} {row['drafts']!s:5} {row['tokens_per_s']:6.2f} tokens/s"
            f"  {row['ratio_to_lock_step']:.2f} times lock-step"
        )


if __name__ == "__main__":
    main()

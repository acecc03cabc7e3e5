"""Stories that must hold three given words: requests as verl's rows, and their reward; for the bundled pair's English.

    python examples/train/verl/stories.py rows.parquet --rows 512

verl calls `compute_score` as `reward.custom_reward_function` (one_gpu.sh).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from pathlib import Path
from typing import Any

WORDS = """
bear boat cat dog farm fish forest fox garden king lake mouse
apple ball cake cloud flower hat kite moon rain ring shell stone
dance help hide jump laugh play run share sing sleep swim thank
angry brave bright happy hungry kind loud quiet sad small tired warm
"""
KINDS = [line.split() for line in WORDS.strip().splitlines()]  # subjects, things, acts, moods


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of verl's data sets: the same for the same seed."""
    draw = random.Random(seed)
    return [_row(index, draw) for index in range(count)]


def _row(index: int, draw: random.Random) -> dict[str, Any]:
    subject, *words = (draw.choice(kind) for kind in KINDS)
    request = "Write a short story about a {} with the words {}, {} and {}.".format(subject, *words)
    return {
        "data_source": "stories",
        "prompt": [{"role": "user", "content": request}],
        "ability": "writing",
        "reward_model": {"style": "rule", "ground_truth": " ".join(words)},
        "extra_info": {"index": index},
    }


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **_: Any,
) -> float:
    """The share of the words that the story holds, in any form that begins alike; from 0 to 1.

    With ROLLOUTS=FILE, each rollout is a line of this file: its text and score, and what midlogit says of it.
    """
    words = ground_truth.split()
    found = sum(bool(re.search(rf"\b{word}", solution_str.lower())) for word in words)
    score = found / len(words)
    if "ROLLOUTS" in os.environ:
        _note(Path(os.environ["ROLLOUTS"]), ground_truth, solution_str, score, extra_info or {})
    return score


def _note(file: Path, words: str, text: str, score: float, extra_info: dict[str, Any]) -> None:
    """Appends a line: several processes of verl may do so at once."""
    names = ("min_global_steps", "max_global_steps", "alpha", "kl_base", "tv_bound")
    of_rollout = {name: extra_info.get(name) for name in names}
    line = {"words": words, "text": text, "score": score, **of_rollout}
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def main() -> None:
    import pandas

    parser = argparse.ArgumentParser(description="Writes requests for stories as a Parquet file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    pandas.DataFrame(rows(given.rows, given.seed)).to_parquet(given.file)


if __name__ == "__main__":
    main()

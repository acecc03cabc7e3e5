"""TRL's gradient on rollouts from q* against the exact one of a pair of 8 ids: the table of docs/training.md.

python -m benchmarks.trl_gradient
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from midlogit import EqualKL, FixedAlpha, SamplingParams
from tests.trl import toy
from tests.trl.test_gradient import measure

RESULTS = Path(__file__).parent / "results" / "trl_gradient.json"
BATCHES = 40  # of 256 completions
WHOLE = {"mode": "sequence_truncate", "clip": 1e9}
ARMS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "the policy's own rollouts": ({"alpha_rule": FixedAlpha(0.0)}, {}),
    "rollout preset, sequence_mask 3 (TRL's default)": (None, {}),
    "equal KL, sequence_truncate 1e9": ({}, WHOLE),
    "equal KL, sequence_mask 3": ({}, {}),
    "equal KL, token_truncate 3": ({}, {"mode": "token_truncate"}),
    "equal KL, sequence_truncate 1e9, the teacher's ending id": ({"stop_id": "teacher"}, WHOLE),
    "equal KL, sequence_truncate 1e9, top-p 0.95": (
        {"constraint_to_target": True, "target_top_p": 0.95},
        WHOLE,
    ),
    "equal KL, no correction": ({}, {"corrected": False}),
}


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        toy.make_pair(folder)
        found = {
            arm: measure(folder, BATCHES, params(changes), checked=changes is None, **options)
            for arm, (changes, options) in ARMS.items()
        }
    rows = {arm: agreement._asdict() for arm, agreement in found.items()}
    for arm, row in rows.items():
        print(f"| {arm} | {row['length']:.3f} | {row['cosine']:.3f} | {row['z']:.1f} |")
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def params(changes: dict[str, Any] | None) -> SamplingParams | None:
    if changes is None:
        return None
    return SamplingParams.preset("rollout", **{"alpha_rule": EqualKL(), "seed": 1, **changes})


if __name__ == "__main__":
    main()

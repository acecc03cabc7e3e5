"""How far q* moves when both models are in FP8, on a real pair; times nothing.

    python -m benchmarks.fp8_shift --base FOLDER/qwen-0.5b --teacher FOLDER/qwen-1.5b

At every token of the answers to 12 chat prompts, α and q* are computed in full from models in bfloat16 and from others
in their place, so that no draw adds noise: both models in FP8 (benchmarks/fp8.py), one of them, and both in float32,
which says what rounding to bfloat16 alone does. Written to benchmarks/results/fp8_shift.json.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.answers import PRESETS, Answer, answers_to, q_of, rows_of
from benchmarks.fp8 import fp8_copy
from benchmarks.local import circumstances, pair_parser
from midlogit.decide.arrays import WholeRows
from midlogit.decide.base import RowSettings
from midlogit.decide.sampling import sample

RESULTS = Path(__file__).parent / "results" / "fp8_shift.json"
# By what is changed, the types of base and teacher.
PAIRS = {
    "both": ("float8", "float8"),
    "base": ("float8", "bfloat16"),
    "teacher": ("bfloat16", "float8"),
    "rounding": ("float32", "float32"),
}
Logits = dict[tuple[str, str], Tensor]  # by side and type


def mixture(
    base_NV: Tensor, teacher_NV: Tensor, settings: list[RowSettings]
) -> tuple[Tensor, Tensor]:
    """α [N] and q* [N, V] of rows of logits, float64."""
    width = min(base_NV.shape[1], teacher_NV.shape[1])
    sampled = sample(WholeRows.of(base_NV[:, :width], teacher_NV[:, :width], settings))
    return sampled.alpha_N.double(), q_of(sampled, width)


def total_variation(p_NV: Tensor, q_NV: Tensor) -> list[float]:
    return (0.5 * (p_NV - q_NV).abs().sum(-1)).tolist()


class Shift:
    """How far q* and both models move, token by token."""

    def __init__(self) -> None:
        self._moved: dict[str, list[float]] = defaultdict(list)

    def add(self, logits: Logits, types: tuple[str, str], settings: list[RowSettings]) -> None:
        """Adds N tokens of a text."""
        sides = "base", "teacher"
        plain = [logits[side, "bfloat16"] for side in sides]
        other = [logits[side, own] for side, own in zip(sides, types, strict=True)]
        alpha_N, q_NV = mixture(*plain, settings)
        other_alpha_N, other_q_NV = mixture(*other, settings)

        moved = self._moved
        moved["total_variation"] += total_variation(q_NV, other_q_NV)
        moved["same_most_likely"] += (q_NV.argmax(-1) == other_q_NV.argmax(-1)).double().tolist()
        moved["alpha"] += alpha_N.tolist()
        moved["abs_change_alpha"] += (alpha_N - other_alpha_N).abs().tolist()
        for side, before_NV, after_NV in zip(sides, plain, other, strict=True):
            moved[f"total_variation_{side}"] += total_variation(
                before_NV.double().softmax(-1), after_NV.double().softmax(-1)
            )

    def means(self) -> dict[str, float]:
        """The number of tokens, and means over them."""
        means = {name: sum(found) / len(found) for name, found in self._moved.items()}
        return {"tokens": len(self._moved["alpha"]), **means}


def logits_of(folders: dict[str, str], texts: list[Answer]) -> dict[tuple[str, str], list[Tensor]]:
    """Logits of every text by side and type, one model in memory after the other."""
    from transformers import AutoModelForCausalLM

    found = {}
    for side, folder in folders.items():
        for own in ("bfloat16", "float8", "float32"):
            stored = torch.float32 if own == "float32" else torch.bfloat16
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=stored).eval()
            if own == "float8":
                model = fp8_copy(model)
            found[side, own] = [rows_of(model, side, text) for text in texts]
    return found


def main() -> None:
    from midlogit import Pair

    parser = pair_parser(__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()

    folders = {"base": chosen.base, "teacher": chosen.teacher}
    options = {"dtype": "bfloat16", "device": "cpu", "speculation": "off"}
    with Pair.local(**folders, **options) as pair:
        texts = {preset: answers_to(pair, preset) for preset in PRESETS}

    rows = []
    for preset, own in texts.items():
        logits = logits_of(folders, own)
        for changed, types in PAIRS.items():
            shift = Shift()
            for n, text in enumerate(own):
                shift.add({key: found[n] for key, found in logits.items()}, types, text.settings)
            rows.append({"preset": preset, "changed": changed, **shift.means()})
            print(rows[-1], flush=True)
    document = {**circumstances(chosen.base, chosen.teacher, "bfloat16"), "rows": rows}
    chosen.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

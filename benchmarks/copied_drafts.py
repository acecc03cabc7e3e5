"""How often an FP8 copy of the base would draft what the base draws from the same random numbers; times nothing.

    python -m benchmarks.copied_drafts --base FOLDER/qwen-0.5b --teacher FOLDER/qwen-1.5b

A copy that is cheaper to read could draft, and the base then read all drafts in one forward pass: a draft stands where
the base draws it too. How often that is depends on how the random numbers choose a token. Each way is computed in full
at every token of the answers to 12 chat prompts, so that no draw adds noise: by the largest of the log-probabilities
with Gumbel noise, of blocks of ids first as midlogit draws, or of all ids at once; and by inverse CDF. A base in
bfloat16 stands beside the copy: another batch or another engine rounds like that, and how often it draws the same token
is how well a seed is kept. Written to benchmarks/results/copied_drafts.json.

benchmarks/fp8.py says what is in FP8.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.answers import PRESETS, answers_to, q_of, rows_of
from benchmarks.fp8 import fp8_copy
from benchmarks.local import circumstances, pair_parser
from midlogit.core.draw import TINY
from midlogit.core.noise import IDS_PER_BLOCK
from midlogit.decide.arrays import WholeRows
from midlogit.decide.base import RowSettings
from midlogit.decide.sampling import sample

RESULTS = Path(__file__).parent / "results" / "copied_drafts.json"
COPIES = ("float8", "bfloat16")


def inverse_cdf(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The probability [V] that both distributions draw an id from one uniform number."""
    (p_low, p_high), (q_low, q_high) = ((x.cumsum(0) - x, x.cumsum(0)) for x in (p_V, q_V))
    return (p_high.minimum(q_high) - p_low.maximum(q_low)).clamp(min=0)


def gumbel_max(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The probability [V] that both draw an id, where Gumbel noise chooses a block of ids and then an id in it."""
    (p_parts, q_parts) = (x_V.split(IDS_PER_BLOCK) for x_V in (p_V, q_V))
    p_B, q_B = (torch.stack([x.sum() for x in parts]) for parts in (p_parts, q_parts))
    within = [
        gumbel_max_at_once(p / p.sum().clamp(min=TINY), q / q.sum().clamp(min=TINY))
        for p, q in zip(p_parts, q_parts, strict=True)
    ]
    blocks = gumbel_max_at_once(p_B, q_B)
    return torch.cat([x * both for x, both in zip(within, blocks, strict=True)])


def gumbel_max_at_once(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The probability [V] that both draw an id, each the largest of its log-probabilities with one Gumbel noise.

    It is 1 / sum_j max(p_j / p_i, q_j / q_i): of the ids before i in the order of p / q, p counts, of the others q.
    """
    order_V = (p_V.log() - q_V.log()).nan_to_num(nan=0.0).argsort(descending=True)
    p_sorted_V, q_sorted_V = p_V[order_V], q_V[order_V]
    before_V = p_sorted_V.cumsum(0) - p_sorted_V
    after_V = q_sorted_V.flip(0).cumsum(0).flip(0)
    both_V = 1 / (before_V / p_sorted_V + after_V / q_sorted_V)
    drawn_V = (p_sorted_V > 0) & (q_sorted_V > 0)
    return torch.zeros_like(p_V).scatter(0, order_V, both_V.where(drawn_V, 0.0))


COUPLINGS = {
    "inverse_cdf": inverse_cdf,
    "gumbel_max": gumbel_max,
    "gumbel_max_at_once": gumbel_max_at_once,
}


def measure(pair: Any, models: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """A row for each preset and each model in the base's place."""
    for preset in PRESETS:
        found = {copied: Agreement() for copied in COPIES}
        for answer in answers_to(pair, preset):
            rows = {
                name: rows_of(model, "teacher" if name == "teacher" else "base", answer)
                for name, model in models.items()
            }
            for copied, agreement in found.items():
                agreement.add(rows["base"], rows[copied], rows["teacher"], answer.settings)
        for copied, agreement in found.items():
            yield {"preset": preset, "copy": copied, **agreement.means()}


class Agreement:
    """How often a model in the base's place draws what the base draws, token by token."""

    def __init__(self) -> None:
        self._rates: dict[str, list[float]] = defaultdict(list)

    def add(
        self, base_NV: Tensor, copy_NV: Tensor, teacher_NV: Tensor, settings: list[RowSettings]
    ) -> None:
        """Adds N tokens of a text, by their logits."""
        width = min(base_NV.shape[1], teacher_NV.shape[1])
        base_NV, copy_NV, teacher_NV = (x[:, :width] for x in (base_NV, copy_NV, teacher_NV))
        sampled = sample(WholeRows.of(base_NV, teacher_NV, settings))
        q_NV = q_of(sampled, width)
        copied = sample(WholeRows.of(copy_NV, teacher_NV, settings))
        drafted_NV, copied_NV = (x.log_weights[0].double().softmax(-1) for x in (sampled, copied))
        for d_V, c_V, q_V in zip(drafted_NV, copied_NV, q_NV, strict=True):
            self._add(d_V, c_V, q_V)

    def _add(self, base_V: Tensor, copy_V: Tensor, q_V: Tensor) -> None:
        accepted_V = (q_V / base_V.clamp(min=1e-300)).clamp(max=1)
        self._rates["accepted"].append(float((base_V * accepted_V).sum()))
        self._rates["overlap"].append(float(base_V.minimum(copy_V).sum()))
        for name, coupling in COUPLINGS.items():
            both_V = coupling(copy_V, base_V)
            self._rates[name].append(float(both_V.sum()))
            self._rates[f"{name}_accepted"].append(float((both_V * accepted_V).sum()))

    def means(self) -> dict[str, float]:
        """The means over all tokens, and their number.

        Returns:
            tokens; accepted: of the base's own drafts; overlap: of both distributions; and for each coupling how often
            the copy draws the base's token, and how often that is also accepted.
        """
        rates = self._rates
        means = {name: sum(found) / len(found) for name, found in rates.items()}
        return {"tokens": len(rates["accepted"]), **means}


def main() -> None:
    from transformers import AutoModelForCausalLM

    from midlogit import Pair

    parser = pair_parser(__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()

    load = AutoModelForCausalLM.from_pretrained
    models = {
        side: load(folder, dtype=torch.float32).eval()
        for side, folder in (("base", chosen.base), ("teacher", chosen.teacher))
    }
    models["float8"] = fp8_copy(models["base"])
    models["bfloat16"] = load(chosen.base, dtype=torch.bfloat16).eval()
    options = {"dtype": "bfloat16", "device": "cpu", "speculation": "off"}
    with Pair.local(chosen.base, chosen.teacher, **options) as pair:
        rows = list(measure(pair, models))
    print(*rows, sep="\n")
    document = {**circumstances(chosen.base, chosen.teacher, "float32"), "rows": rows}
    chosen.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How often drafts from other distributions than the base's would be accepted, on a real pair; times nothing.

    python -m benchmarks.draft_distributions --base FOLDER/qwen-0.5b --teacher FOLDER/qwen-1.5b

A draft from D is accepted with probability sum(min(D, q*)), which is computed at every token of the answers to 12 chat
prompts, so that no draw adds noise: for the base as it is, cut by min-p or by top-p, and at other temperatures. Written
to benchmarks/results/draft_distributions.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.local import PROMPTS, circumstances, pair_parser
from midlogit.decide.array_decider import ArrayDecider
from midlogit.decide.arrays import WholeRows
from midlogit.decide.base import Decided, LogitRows, RowSettings
from midlogit.decide.sampling import sample

RESULTS = Path(__file__).parent / "results" / "draft_distributions.json"
PRESETS = ("balanced", "exploratory")
TOKENS = 24


def min_p(share: float) -> Callable[[Tensor], Tensor]:
    return lambda base_NV: base_NV * (base_NV >= share * base_NV.amax(-1, keepdim=True))


def top_p(mass: float) -> Callable[[Tensor], Tensor]:
    def cut(base_NV: Tensor) -> Tensor:
        sorted_NV, order_NV = base_NV.sort(-1, descending=True)
        kept_NV = sorted_NV * (sorted_NV.cumsum(-1) - sorted_NV < mass)
        return torch.zeros_like(base_NV).scatter(-1, order_NV, kept_NV)

    return cut


def power(exponent: float) -> Callable[[Tensor], Tensor]:
    return lambda base_NV: base_NV**exponent


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "base": lambda base_NV: base_NV,
    **{f"min-p {share}": min_p(share) for share in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)},
    **{f"top-p {mass}": top_p(mass) for mass in (0.9, 0.95, 0.98)},
    **{f"temperature {t}": power(1 / t) for t in (0.7, 0.8, 0.85, 0.9)},
}


class Recording(ArrayDecider):
    """Keeps the acceptance of each change of the base at every token that is not forced."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        self.rates: dict[str, list[float]] = {name: [] for name in CHANGES}

    def decide(
        self, base: LogitRows, teacher: LogitRows, settings: Sequence[RowSettings]
    ) -> Decided:
        free = [n for n, row in enumerate(settings) if not row.forced]
        if free:
            rows = (side.logits_RV[[side.rows[n] for n in free]] for side in (base, teacher))
            self._record(*rows, [settings[n] for n in free])
        return super().decide(base, teacher, settings)

    def _record(self, base_NV: Tensor, teacher_NV: Tensor, settings: list[RowSettings]) -> None:
        sampled = sample(WholeRows.of(base_NV, teacher_NV, settings))
        q_NK = sampled.log_q_NV.double().exp()
        drafted_NV = sampled.log_weights[0].double().softmax(-1)
        for name, change in CHANGES.items():
            changed_NV = change(drafted_NV)
            changed_NV = changed_NV / changed_NV.sum(-1, keepdim=True)
            if sampled.support is not None:
                changed_NV = changed_NV.gather(-1, sampled.support.columns_NK)
            self.rates[name] += changed_NV.minimum(q_NK).sum(-1).tolist()


def measure(pair: Any) -> Iterator[dict[str, Any]]:
    """A row for each preset."""
    from midlogit import SamplingParams

    for preset in PRESETS:
        recording = pair.engine.decider = Recording(pair.mixing.alignment.size)
        asked = SamplingParams.preset(preset, max_tokens=TOKENS, seed=1, ignore_eos=True)
        pair.generate(PROMPTS, asked, chat=True, progress=False)
        rates = recording.rates
        means = {name: sum(found) / len(found) for name, found in rates.items()}
        yield {"preset": preset, "tokens": len(rates["base"]), "acceptance": means}


def main() -> None:
    from midlogit import Pair

    parser = pair_parser(__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()

    rows = []
    options = {"dtype": "bfloat16", "device": "cpu", "speculation": "off"}
    with Pair.local(chosen.base, chosen.teacher, **options) as pair:
        for row in measure(pair):
            print(row, flush=True)
            rows.append(row)
            document = {
                **circumstances(chosen.base, chosen.teacher, options["dtype"]),
                "rows": rows,
            }
            chosen.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

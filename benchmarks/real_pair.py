"""Speed, law, scoring and FP8 of a real pair on one GPU, on code prompts, in one run.

    python -m benchmarks.real_pair --base FOLDER/qwen-0.5b --teacher FOLDER/qwen-1.5b
    python -m benchmarks.real_pair --base FOLDER --teacher FOLDER --small      a few tokens, to try the plumbing

Nothing is simulated: drafts are those of the base, accepted as q* decides. Each part is written to
benchmarks/results/speculation_real_gpu.json as soon as it is measured (benchmarks/real_speed.py and
benchmarks/real_law.py say how).
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from benchmarks.common import VERSIONS
from benchmarks.local import pair_parser
from benchmarks.real_law import law, sample, sampled_texts, scores_of, shift
from benchmarks.real_speed import Size, alone_apart, cost_of_top, rates
from benchmarks.scoring import given_texts, time_scoring

RESULTS = Path(__file__).parent / "results" / "speculation_real_gpu.json"
FULL = Size([1, 8, 64], (0, 3, 5, "auto"), num_texts=64, tokens=160, scored_tokens=1000)
SMALL = Size([1, 2], (0, 2, "auto"), num_texts=2, tokens=12, scored_tokens=16)


class Results:
    """The document of results; written each time a part is there."""

    def __init__(self, output: Path, models: list[str]) -> None:
        import torch

        on_gpu = torch.cuda.is_available()
        self._output = output
        self._document: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "versions": {d.name: d.version for d in distributions() if d.name in VERSIONS},
            "date": datetime.date.today().isoformat(),
            "models": models,
        }

    def add(self, part: str, measure: Callable[[], Any]) -> Any:
        """Measures a part and writes it; a part that fails says why, in its place."""
        start = time.perf_counter()
        try:
            found = measure()
        except Exception as error:  # whatever vLLM cannot do here; the other parts are worth having
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        self._document[part] = found
        self._output.write_text(json.dumps(self._document, indent=2) + "\n")

        print(f"{part} ({time.perf_counter() - start:.0f} s)", flush=True)
        for row in found if isinstance(found, list) else [found]:
            print("   ", row, flush=True)
        return found


def measure_plain(options: dict[str, Any], size: Size, alone: Any, results: Results) -> Any:
    """Measures the pair as it is.

    Returns:
        (sampled texts, their scores), for `measure_fp8`.
    """
    from midlogit import Pair

    with Pair.vllm(**options) as pair:
        results.add("law", lambda: law(pair, size))
        texts = sampled_texts(sample(pair, size, "exploratory", gamma=0))
        scores = scores_of(pair, texts)
        # The same texts again, in another order: what rounding alone does.
        results.add("rounding", lambda: shift(texts, scores, scores_of(pair, texts[::-1])[::-1]))

        results.add("rows", lambda: rates(pair, size, alone["teacher"]["step_ms"]))
        results.add("top_logprobs", lambda: cost_of_top(pair, size))
        given = given_texts(size.num_texts, size.scored_tokens)
        results.add("scoring", lambda: time_scoring(pair, given, alone))
    return texts, scores


def measure_fp8(
    options: dict[str, Any], size: Size, alone: Any, results: Results, texts: Any, scores: Any
) -> None:
    """Measures the pair with both models in FP8, and how far q* moves from that of the plain pair."""
    from midlogit import Pair

    def measure() -> dict[str, Any]:
        with Pair.vllm(**options, quantization="fp8") as pair:
            moved = shift(texts, scores, scores_of(pair, texts))
            few = size._replace(gammas=(0, size.gammas[-2], "auto"))
            return {"shift": moved, "rows": rates(pair, few, alone["teacher"]["step_ms"])}

    results.add("fp8", measure)


def main() -> None:
    parser = pair_parser(__doc__)
    parser.add_argument("--small", action="store_true", help="a few tokens, no CUDA graphs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()

    size = SMALL if chosen.small else FULL
    engine = {"max_model_len": 2048, "max_num_seqs": 64, "dtype": "bfloat16"}
    engine |= {"gpu_memory_utilization": 0.45, "enforce_eager": chosen.small}
    folders = {"base": chosen.base, "teacher": chosen.teacher}
    results = Results(chosen.output, [Path(folder).name for folder in folders.values()])

    alone = results.add(
        "alone",
        lambda: {side: alone_apart(folder, size, engine) for side, folder in folders.items()},
    )
    texts, scores = measure_plain({**folders, **engine}, size, alone, results)
    measure_fp8({**folders, **engine}, size, alone, results, texts, scores)


if __name__ == "__main__":
    main()

"""What `midlogit serve` costs over the library: the same requests through both, in turns, in one process.

    python -m benchmarks.serve

32 completions of 48 tokens by the bundled pair, on a CPU. One request holds all prompts, as a call of `Pair.generate`
does. The medians of all turns, and the ratio of each turn, are printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from midlogit import SamplingParams
from tests.questions import QUESTIONS
from tests.server.conftest import bundled_pair, run_server

REQUESTS, TOKENS, TURNS = 32, 48, 9


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    prompts = [QUESTIONS[n % len(QUESTIONS)] for n in range(REQUESTS)]
    params = SamplingParams.preset("balanced", max_tokens=TOKENS, ignore_eos=True, seed=1)
    body = {"prompt": prompts, "max_tokens": TOKENS, "ignore_eos": True, "seed": 1}
    with run_server(lambda: bundled_pair(REQUESTS), max_num_seqs=REQUESTS) as live:
        turns = [
            (
                seconds(lambda: live.pair.generate(prompts, params, progress=False)),
                seconds(lambda: live.post("/v1/completions", body).raise_for_status()),
            )
            for _ in range(TURNS)
        ]
    library, server = (REQUESTS * TOKENS / median(side) for side in zip(*turns, strict=True))
    ratios = [round(server_s / library_s, 2) for library_s, server_s in turns]
    print(f"library {library:.0f} tokens/s, server {server:.0f} tokens/s; server/library {ratios}")


if __name__ == "__main__":
    main()

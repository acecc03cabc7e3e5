"""The HTTP engine on two running servers: its own cost a token, and what gathering rows into calls is worth.

    python benchmarks/http.py --base http://127.0.0.1:9000/v1 --teacher http://127.0.0.1:9001/v1

Each round runs the same prompts twice, in turn: with the rows of a step gathered into one call a server, and
with one call a sequence and step. Medians over the rounds go to benchmarks/results/http.json.
coordinator_ms_per_token is the processor time of the engine's thread (HTTP, JSON, policy, certificate, text);
server_ms_per_token is the wall time during which some call was in flight. Both are of the gathered runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

# As a script, this folder comes first, and this file would hide the standard library's http.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

# ruff: noqa: E402
import argparse
import json
import platform
import time
from datetime import date
from statistics import median

from midlogit import Pair, SamplingParams

RESULTS = Path(__file__).parent / "results" / "http.json"
PROMPT = "Once upon a time there was a little fox, number {}, who lived in the forest and"


class Meter:
    """Wall time during which calls of a client are in flight."""

    def __init__(self, client) -> None:
        self.seconds = 0.0
        self._open = 0
        self._since = 0.0
        plain = client.once

        async def once(*arguments, **named):
            if not self._open:
                self._since = time.perf_counter()
            self._open += 1
            try:
                return await plain(*arguments, **named)
            finally:
                self._open -= 1
                if not self._open:
                    self.seconds += time.perf_counter() - self._since

        client.once = once


def sides_of(pair: Pair) -> list:
    return [pair._engine._base.side, pair._engine._teacher.side]


def gather_rows(pair: Pair, gathered: bool) -> None:
    for side in sides_of(pair):
        side.max_rows, side.max_calls = (256, 4) if gathered else (1, 100)


def run(pair: Pair, meter: Meter, batch: int, tokens: int, preset: str) -> dict[str, float]:
    """One batch: seconds of the engine's thread, with calls in flight, and on the wall, all for one token."""

    async def thread_time() -> float:
        return time.thread_time()

    prompts = [PROMPT.format(n) for n in range(batch)]
    params = SamplingParams.preset(preset, max_tokens=tokens, seed=1, ignore_eos=True)
    client = pair._engine._client
    busy, served, start = client.run(thread_time()), meter.seconds, time.perf_counter()
    completions = pair.generate(prompts, params, progress=False)
    wall = time.perf_counter() - start
    drawn = sum(len(c.token_ids) for c in completions)
    assert not any(c.error for c in completions), next(c.error for c in completions if c.error)
    return {
        "coordinator": (client.run(thread_time()) - busy) / drawn,
        "server": (meter.seconds - served) / drawn,
        "wall": wall / drawn,
    }


def measure(pair: Pair, meter: Meter, batch: int, tokens: int, rounds: int, preset: str) -> dict[str, float]:
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for round_number in range(rounds + 1):
        for gathered in (True, False):
            gather_rows(pair, gathered)
            found = run(pair, meter, batch, tokens, preset)
            if round_number:  # the first warms the caches of the servers and the pool
                runs[gathered].append(found)
    return {
        "coordinator_ms_per_token": round(1e3 * median(r["coordinator"] for r in runs[True]), 3),
        "server_ms_per_token": round(1e3 * median(r["server"] for r in runs[True]), 3),
        "tokens_per_s": round(1 / median(r["wall"] for r in runs[True]), 1),
        "uncoalesced_tokens_per_s": round(1 / median(r["wall"] for r in runs[False]), 1),
        "speedup_of_each_round": [
            round(b["wall"] / a["wall"], 2) for a, b in zip(runs[True], runs[False], strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--preset", default="balanced")
    options = parser.parse_args()
    rows = []
    with Pair.http(options.base, options.teacher, top_k=options.top_k) as pair:
        meter = Meter(pair._engine._client)
        for batch in options.batches:
            found = measure(pair, meter, batch, options.tokens, options.rounds, options.preset)
            rows.append({"batch": batch, "top_k": options.top_k, "preset": options.preset, **found})
            print(rows[-1])
    result = {"date": str(date.today()), "machine": f"{platform.machine()}, CPU servers", "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

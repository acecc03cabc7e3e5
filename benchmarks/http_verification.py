"""Drafts verified as one sequence and as prompts of their own: calls and prompts a round, and the engine's own time.

    python -m benchmarks.http_verification --base http://127.0.0.1:9000/v1 --teacher http://127.0.0.1:9001/v1

The teacher must verify drafts as one sequence (docs/http.md); for the other way a proxy hides that. Both ways run
the same prompts. Each is new to the servers: after one that they have had, their caches would hide rows. Medians
over the rounds go to benchmarks/results/http_verification.json. Per round of drafts:

- base_calls, teacher_calls: calls for rows; teacher_prompts: prompts in those to the teacher;

and per token, of the processor time of the engine's thread, so that other processes count little:

- coordinator_ms: between an answer and the next request, while no call is on the wire;
- processor_ms: all of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from random import randrange
from statistics import median

from benchmarks.http import PROMPT, Wire
from midlogit import Pair, SamplingParams
from tests.http.proxy import Proxy

RESULTS = Path(__file__).parent / "results" / "http_verification.json"


def counted(base: Proxy, teacher: Proxy) -> tuple[int, int, int]:
    return base.calls, teacher.calls, teacher.rows


def run(
    pair: Pair, proxies: tuple[Proxy, Proxy], wire: Wire, prompt: str, params: SamplingParams
) -> dict[str, float]:
    async def thread_time() -> float:
        return time.thread_time()

    client, statistics = pair.engine.client, pair.statistics
    before, rounds = counted(*proxies), statistics()["speculation"]["rounds"]
    wire.seconds()
    processor = client.run(thread_time())
    (completion,) = pair.generate([prompt], params, progress=False)
    processor = client.run(thread_time()) - processor
    on_wire, inner = wire.seconds()
    assert completion.error is None, completion.error

    rounds = statistics()["speculation"]["rounds"] - rounds
    names = ("base_calls", "teacher_calls", "teacher_prompts")
    per_round = {
        name: (after - earlier) / rounds
        for name, after, earlier in zip(names, counted(*proxies), before, strict=True)
    }
    tokens = len(completion.token_ids)
    return {
        "tokens": tokens / rounds,
        **per_round,
        "coordinator_ms": 1e3 * (inner - on_wire) / tokens,
        "processor_ms": 1e3 * processor / tokens,
    }


def measure(
    base: Proxy, teacher: Proxy, wire: Wire, params: SamplingParams, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Medians of both ways."""
    found: dict[str, list[dict[str, float]]] = {"one sequence": [], "prompts": []}
    with ExitStack() as stack:
        pairs = {}
        for way in found:
            teacher.scales_out = way == "one sequence"
            pairs[way] = stack.enter_context(
                Pair.http(base.url, teacher.url, speculation=options.drafts)
            )
        teacher.scales_out = True
        for round_number in range(options.rounds + 1):
            prompt = PROMPT.format(randrange(10**9))
            for way, pair in pairs.items():
                one = run(pair, (base, teacher), wire, prompt, params)
                if round_number:  # the first compiles and connects
                    found[way].append(one)
    return {
        way: {name: round(median(one[name] for one in some), 2) for name in some[0]}
        for way, some in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--presets", nargs="+", default=["balanced", "exploratory"])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    options = parser.parse_args()
    rows, wire = [], Wire(time.thread_time)
    with Proxy(options.base) as base, Proxy(options.teacher) as teacher:
        for preset in options.presets:
            for temperature in options.temperatures:
                params = SamplingParams.preset(
                    preset,
                    max_tokens=options.tokens,
                    seed=1,
                    temperature=temperature,
                    ignore_eos=True,
                )
                for way, found in measure(base, teacher, wire, params, options).items():
                    where = {"preset": preset, "temperature": temperature, "verified_as": way}
                    rows.append({**where, **found})
                    print(rows[-1], flush=True)
    result = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, CPU servers, the teacher's kernels interpreted",
        "drafts": options.drafts,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Speculation between two running servers against lock-step: tokens per second, calls per token, with network delay.

    python -m benchmarks.http_speculation --base http://127.0.0.1:9000/v1 --teacher http://127.0.0.1:9001/v1

Every call passes a proxy (tests/http/proxy.py) that holds it back for the delay. The settings run in turn, once per
round. Medians over the rounds go to benchmarks/results/http_speculation.json, beside earlier rows with other batches,
delays and temperatures. Requests give no seed, since "auto" drafts nothing for those that do.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median

from midlogit import Pair, SamplingParams
from tests.http.proxy import Proxy

RESULTS = Path(__file__).parent / "results" / "http_speculation.json"
PROMPT = "Once upon a time there was a little fox, number {}, who lived in the forest and"
SETTINGS = ("off", 2, 4, "auto")


def hold_back(proxy: Proxy, milliseconds: int) -> None:
    def fault(call: int) -> str:
        time.sleep(milliseconds / 1e3)
        return ""

    proxy.fault = fault


def run(pair: Pair, proxies: list[Proxy], batch: int, params: SamplingParams) -> dict[str, float]:
    calls, start = sum(proxy.calls for proxy in proxies), time.perf_counter()
    completions = pair.generate([PROMPT.format(n) for n in range(batch)], params, progress=False)
    wall = time.perf_counter() - start
    assert not any(c.error for c in completions), next(c.error for c in completions if c.error)
    drawn = sum(len(c.token_ids) for c in completions)
    return {
        "tokens_per_s": drawn / wall,
        "calls_per_token": (sum(p.calls for p in proxies) - calls) / drawn,
    }


def measure(
    pairs: dict[str | int, Pair],
    proxies: list[Proxy],
    batch: int,
    params: SamplingParams,
    rounds: int,
) -> list[dict[str, object]]:
    """A row for each setting."""
    runs: dict[str | int, list[dict[str, float]]] = {setting: [] for setting in pairs}
    for round_number in range(rounds + 1):
        for setting, pair in pairs.items():
            found = run(pair, proxies, batch, params)
            if round_number:  # the first warms the servers' caches, and "auto" up
                runs[setting].append(found)
    lockstep = median(r["tokens_per_s"] for r in runs["off"])
    rows = []
    for setting, some in runs.items():
        speed, drafts = (
            median(r["tokens_per_s"] for r in some),
            pairs[setting].statistics()["speculation"],
        )
        rows.append(
            {
                "speculation": setting,
                "tokens_per_s": round(speed, 1),
                "times_lockstep": round(speed / lockstep, 2),
                "calls_per_token": round(median(r["calls_per_token"] for r in some), 2),
                "acceptance": drafts["acceptance"] and round(drafts["acceptance"], 3),
                "accepted_per_round": drafts["accepted_per_round"]
                and round(drafts["accepted_per_round"], 2),
                "drafts_in_use": drafts["drafts_in_use"],
            }
        )
    return rows


def key(row: dict[str, object]) -> tuple[object, ...]:
    return row["delay_ms"], row["batch"], row["temperature"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument(
        "--delays", type=int, nargs="+", default=[0, 20], help="milliseconds added to each call"
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--preset", default="balanced")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for delay in options.delays:
        for batch in options.batches:
            for temperature in options.temperatures:
                params = SamplingParams.preset(
                    options.preset,
                    max_tokens=options.tokens,
                    temperature=temperature,
                    ignore_eos=True,
                )
                with ExitStack() as stack:
                    proxies = [
                        stack.enter_context(Proxy(url)) for url in (options.base, options.teacher)
                    ]
                    for proxy in proxies:
                        hold_back(proxy, delay)
                    base, teacher = (proxy.url for proxy in proxies)
                    pairs = {
                        s: stack.enter_context(
                            Pair.http(base, teacher, top_k=options.top_k, speculation=s)
                        )
                        for s in SETTINGS
                    }
                    found = measure(pairs, proxies, batch, params, options.rounds)
                for row in found:
                    where = {"batch": batch, "delay_ms": delay, "temperature": temperature}
                    rows.append({**where, "date": str(date.today()), **row})
                    print(rows[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    before = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    measured = {key(row) for row in rows}
    rows = sorted([*(row for row in before if key(row) not in measured), *rows], key=key)
    result = {
        "machine": f"{platform.machine()}, CPU servers",
        "preset": options.preset,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

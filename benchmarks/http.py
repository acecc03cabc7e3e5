"""The HTTP engine on two running servers: its own cost per token, and the gain of batching rows into calls.

    python -m benchmarks.http --base http://127.0.0.1:9000/v1 --teacher http://127.0.0.1:9001/v1

The servers' processor time must not count, but does where they share processors with the engine: pin them to some
and this script to others (taskset -c).

Each round runs the same prompts twice: with the rows of a step gathered into one call per server, and with one call per
sequence and step. Medians over the rounds go to benchmarks/results/http.json. Of the gathered runs:

- server_ms_per_token: wall time during which some call is on the wire, from the write of its request to the read of
  the last of its answer;
- coordinator_ms_per_token: all other wall time between the first request and the last answer, that is, from each
  answer to the next request. Work of the engine while a server works is not in it;
- ends_ms_per_call: wall time before the first request and after the last answer, once per call;
- processor_ms_per_token: processor time of the engine's thread, whenever it is spent. With many sequences some call
  is nearly always on the wire, so this is the cost that counts there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median

from aiohttp.client_proto import ResponseHandler

from midlogit import Pair, SamplingParams
from midlogit.engines.http.exchange import Address

RESULTS = Path(__file__).parent / "results" / "http.json"
PROMPT = "Once upon a time there was a little fox, number {}, who lived in the forest and"


class Wire:
    """Notes when a request is written to and an answer is read from each connection of the process.

    Args:
        clock: seconds; of the processor time of the thread, where only that is to be counted.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._notes: dict[object, list[tuple[str, float]]] = {}
        self._watch(Address, "send", lambda address, protocol, body: protocol, "sent")
        self._watch(ResponseHandler, "data_received", lambda protocol, data: protocol, "read")

    def _watch(
        self, kind: type, method: str, connection_of: Callable[..., object], what: str
    ) -> None:
        plain = getattr(kind, method)

        def noted(self_, *arguments):
            self._notes.setdefault(connection_of(self_, *arguments), []).append(
                (what, self._clock())
            )
            plain(self_, *arguments)

        setattr(kind, method, noted)

    def seconds(self) -> tuple[float, float]:
        """Seconds since the last call: with some call on the wire, and from the first request to the last answer."""
        spans = sorted(span for notes in self._notes.values() for span in _spans(notes))
        self._notes.clear()
        total, until = 0.0, 0.0
        for start, end in spans:
            total += max(end - max(start, until), 0.0)
            until = max(until, end)
        return total, until - spans[0][0] if spans else 0.0


def _spans(notes: list[tuple[str, float]]) -> Iterator[tuple[float, float]]:
    """Spans from the last note "sent" before some notes "read" to the last of those."""
    for (what, at), (next_what, _) in pairwise([*notes, ("sent", 0.0)]):
        if what == "sent" and next_what == "read":
            start = at
        elif what == "read" and next_what == "sent":
            yield start, at


def pools_of(pair: Pair) -> list:
    return [pair.engine.sides.base.replicas, pair.engine.sides.teacher.replicas]


def gather_rows(pair: Pair, gathered: bool) -> None:
    for pool in pools_of(pair):
        pool.max_rows, pool.max_calls = (256, 4) if gathered else (1, 100)


def run(pair: Pair, wire: Wire, batch: int, tokens: int, preset: str) -> dict[str, float]:
    """One batch: seconds per token of wall time, on the wire, off the wire and of the engine's thread; of the ends."""

    async def thread_time() -> float:
        return time.thread_time()

    prompts = [PROMPT.format(n) for n in range(batch)]
    params = SamplingParams.preset(preset, max_tokens=tokens, seed=1, ignore_eos=True)
    client = pair.engine.client
    wire.seconds()
    processor, start = client.run(thread_time()), time.perf_counter()
    completions = pair.generate(prompts, params, progress=False)
    wall = time.perf_counter() - start
    server, inner = wire.seconds()
    processor = client.run(thread_time()) - processor
    assert not any(c.error for c in completions), next(c.error for c in completions if c.error)
    seconds = {
        "wall": wall,
        "server": server,
        "coordinator": inner - server,
        "processor": processor,
    }
    drawn = sum(len(c.token_ids) for c in completions)
    return {**{name: value / drawn for name, value in seconds.items()}, "ends": wall - inner}


def measure(
    pair: Pair, wire: Wire, batch: int, tokens: int, rounds: int, preset: str
) -> dict[str, float]:
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for round_number in range(rounds + 1):
        for gathered in (True, False):
            gather_rows(pair, gathered)
            found = run(pair, wire, batch, tokens, preset)
            if round_number:  # the first warms the caches of the servers and the pool
                runs[gathered].append(found)
    found = {
        f"{name}_ms_per_token": round(1e3 * median(r[name] for r in runs[True]), 3)
        for name in ("coordinator", "server", "processor")
    }
    return {
        **found,
        "ends_ms_per_call": round(1e3 * median(r["ends"] for r in runs[True]), 1),
        "tokens_per_s": round(1 / median(r["wall"] for r in runs[True]), 1),
        "uncoalesced_tokens_per_s": round(1 / median(r["wall"] for r in runs[False]), 1),
        "speedup_of_each_round": [
            round(b["wall"] / a["wall"], 2) for a, b in zip(runs[True], runs[False], strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--preset", default="balanced")
    options = parser.parse_args()
    rows, wire = [], Wire()
    with Pair.http(options.base, options.teacher, top_k=options.top_k) as pair:
        for batch in options.batches:
            found = measure(pair, wire, batch, options.tokens, options.rounds, options.preset)
            rows.append({"batch": batch, "top_k": options.top_k, "preset": options.preset, **found})
            print(rows[-1])
    result = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, CPU servers; processors of this process: {sorted(os.sched_getaffinity(0))}",
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

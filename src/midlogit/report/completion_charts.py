"""Pictures of completions: their largest KL, weights, lengths and repetition; knows numbers of runs, draws nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from midlogit.look import LIGHT
from midlogit.report.numbers import Numbers
from midlogit.report.picture import HEIGHT, Picture, histograms, percent
from midlogit.report.token_charts import SIDE_KEY
from midlogit.report.vega import (
    RUNS,
    SIDES,
    Rows,
    Spec,
    layer,
    powers,
    silent,
    token_axis,
    told,
    view,
    x,
    y,
)

DASHES = {"domain": ["base", "teacher"], "range": [[1, 0], [5, 4]]}
LEAST = 20  # completions of a length, below which their ESS says nothing


def kl_largest(runs: Sequence[Numbers], key: Any) -> Picture:
    series = [run["kl"]["largest"]["histogram"] for run in runs]

    def spec(width: int) -> Spec:
        return view(
            histograms(
                series,
                x("from", "nats", **powers(-4, 2)),
                "largest KL",
                power=True,
                of="completions",
            ),
            width,
            HEIGHT,
        )

    return Picture(
        "kl_largest", "kl", "Largest KL of each completion",
        "Each bar is the share of completions whose worst token is that far from one of the models. The right tail is "
        "what a filter on max_kl would drop.",
        spec, key,
    )  # fmt: skip


def ess_length(runs: Sequence[Numbers], key: Any) -> Picture | None:
    rows: Rows = []
    for number, run in enumerate(runs):
        for entry in run["ess"]["by_length"]:
            if entry["count"] < LEAST:
                continue
            for side in ("base", "teacher"):
                rows.append(
                    {
                        "x": math.sqrt(entry["from"] * max(entry["to"], entry["from"])), "from": entry["from"],
                        "to": entry["to"] + 1, "share": max(entry[side], 1e-4), "side": side, "run": number,
                        "colour": RUNS[number] if len(runs) == 2 else SIDES[side],
                        "says": f"{entry['from']} to {entry['to']} tokens, {entry['count']:,} completions: base "
                        f"{percent(entry['base'])}, teacher {percent(entry['teacher'])}",
                    }
                )  # fmt: skip
    if not rows:
        return None
    last = max(row["to"] for row in rows)
    floor = 10 ** math.floor(math.log10(min(row["share"] for row in rows)))

    def spec(width: int) -> Spec:
        first = min(row["from"] for row in rows)
        axis = token_axis(last)
        axis["scale"] = {"type": "log", "base": 2, "domain": [first, last]}
        across = x("x", "tokens of the completion", **axis)
        up = y(
            "share",
            "ESS, share of completions",
            scale={"type": "log", "domain": [floor, 1]},
            axis={"format": "~%", "values": [1, 0.1, 0.01, 0.001, 0.0001]},
        )
        lines = layer(
            rows, silent({"type": "line", "point": {"filled": True, "size": 28}, "strokeWidth": 2}), x=across, y=up,
            color={"field": "colour", "type": "nominal", "scale": None},
            strokeDash={"field": "side", "type": "nominal", "scale": DASHES, "legend": None},
            detail=[{"field": "run"}, {"field": "side"}],
        )  # fmt: skip
        return view([lines, told(rows[::2], "from", "to", across)], width, HEIGHT)

    keys = SIDE_KEY if len(runs) == 1 else (*key, (LIGHT["soft"], "dashed: teacher", True))
    return Picture(
        "ess_length", "ess", "ESS of whole sequences, by length",
        "Kish's effective sample size of the weights exp(log p − log q) of whole completions, as a share of their "
        "number and at least one of them. Weights multiply along a text: below 1% a correction by sequence weights is "
        "noise.",
        spec, keys,
    )  # fmt: skip


def lengths(runs: Sequence[Numbers], key: Any) -> Picture:
    series = []
    for run in runs:
        total = sum(entry["count"] for entry in run["lengths"]["histogram"]) or 1
        # A bin without a whole number in it has no length to count.
        bins = [entry for entry in run["lengths"]["histogram"] if entry["to"] >= entry["from"]]
        series.append(
            [{"from": e["from"], "to": e["to"] + 1, "share": e["count"] / total} for e in bins]
        )
    last = max((row["to"] for rows in series for row in rows), default=2)
    first = min((row["from"] for rows in series for row in rows), default=1)

    def spec(width: int) -> Spec:
        axis = token_axis(last)
        axis["scale"] = {"type": "log", "base": 2, "domain": [first, last]}
        return view(
            histograms(series, x("from", "tokens", **axis), "length", of="completions", whole=True),
            width,
            HEIGHT,
        )

    return Picture(
        "lengths", "lengths", "Lengths of completions",
        "Each bar is the share of completions of that length, in quarters of an octave. A spike at the right end is "
        "the limit max_tokens: those texts were cut off.",
        spec, key,
    )  # fmt: skip


def repetition(runs: Sequence[Numbers], key: Any) -> Picture:
    series = [run["lengths"]["repetition_histogram"] for run in runs]

    def spec(width: int) -> Spec:
        across = x(
            "from",
            "share of 4-grams that occurred before",
            scale={"domain": [0, 1]},
            axis={"format": "%"},
        )
        return view(histograms(series, across, "repeated", of="completions"), width, HEIGHT)

    return Picture(
        "repetition", "lengths", "Repetition inside completions",
        "Each bar is the share of completions in which that share of runs of four tokens had occurred before. Texts "
        "above one half go round in circles.",
        spec, key,
    )  # fmt: skip

"""Pictures that only two runs have: differences, where texts part; knows the numbers of a comparison, draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from midlogit.look import LIGHT
from midlogit.report.html import number
from midlogit.report.numbers import Numbers
from midlogit.report.picture import HEIGHT, Picture, percent
from midlogit.report.vega import RUNS, Rows, Spec, layer, silent, token_axis, told, view, x, y

BANDS = {"alpha": ("α", "α"), "kl_base": ("KL to the base", "nats"), "entropy": ("Entropy", "nats")}
SURE = 0.05  # p below which a difference is set in bold  # p below which a difference is no chance


def compared_pictures(found: Numbers, runs: Sequence[Numbers]) -> list[Picture]:
    """The pictures that only two runs have."""
    shown = (
        [_forest(found["metrics"], [run["head"]["name"] for run in runs])]
        if found["metrics"]
        else []
    )
    if found["texts"] and found["texts"]["pairs"]:
        shown.append(_together(found["texts"]))
    for name in BANDS:
        if found["by_position"] and found["by_position"][name]:
            shown.append(_band(name, found["by_position"][name]))
    return shown


def _forest(metrics: Sequence[Numbers], names: Sequence[str]) -> Picture:
    rows = []
    for metric in metrics:
        spread = metric["difference"] / metric["effect"] if metric["effect"] else None
        ends = [
            metric[end] / spread if spread and metric[end] is not None else metric["effect"]
            for end in ("low", "high")
        ]
        rows.append(
            {
                "label": metric["label"], "effect": metric["effect"], "low": ends[0], "high": ends[1],
                "says": f"{metric['label']}: {number(metric['difference'])}, {metric['effect']:+.2f} SD",
                "colour": RUNS[1] if is_sure(metric) else LIGHT["soft"],
            }
        )  # fmt: skip

    def spec(width: int) -> Spec:
        across = x("effect", "standard deviations of a completion")
        order = [row["label"] for row in rows]
        limit = 160 if width > 400 else 118
        up = {
            "field": "label",
            "type": "nominal",
            "sort": order,
            "axis": {"title": None, "labelLimit": limit, "grid": True},
        }
        colour = {"field": "colour", "type": "nominal", "scale": None}
        zero = layer(
            [{"at": 0}],
            silent({"type": "rule", "color": LIGHT["soft"]}),
            x={**across, "field": "at"},
        )
        bars = layer(
            rows,
            silent({"type": "rule", "strokeWidth": 2.5}),
            x={**across, "field": "low"},
            x2={"field": "high"},
            y=up,
            color=colour,
        )
        points = layer(
            rows, {"type": "point", "filled": True, "size": 70, "opacity": 1}, x=across, y=up, color=colour,
            description={"field": "says"},
        )  # fmt: skip
        return view([zero, bars, points], width, 60 + 22 * len(rows))

    return Picture(
        "effects", "differences", "Differences in standard deviations",
        "A point right of 0 says that the second run has more of it, its bar is the 95% interval. Coloured ones remain "
        "after Holm's adjustment for the number of metrics, grey ones may be chance.",
        spec,
    )  # fmt: skip


def _together(found: Numbers) -> Picture:
    rows = []
    for point in found["together"]:
        tokens = max(point["tokens"], 1)
        says = f"after {point['tokens']} tokens {percent(point['share'])} of pairs are still equal"
        if point["tokens"]:
            rows.append(
                {
                    "tokens": tokens,
                    "share": point["share"],
                    "from": tokens,
                    "to": 1.42 * tokens,
                    "says": says,
                }
            )

    def spec(width: int) -> Spec:
        across = x(
            "tokens", "tokens", **token_axis(max((row["tokens"] for row in rows), default=2))
        )
        up = y(
            "share", "pairs that are still equal", scale={"domain": [0, 1]}, axis={"format": "%"}
        )
        line = {
            "type": "line",
            "color": LIGHT["middle"],
            "strokeWidth": 2.2,
            "point": {"size": 22, "filled": True, "color": LIGHT["middle"]},
        }
        return view(
            [layer(rows, silent(line), x=across, y=up), told(rows, "from", "to", across)],
            width,
            HEIGHT,
        )

    return Picture(
        "together", "differences", "Where texts part",
        "The curve is the share of matched pairs whose first so many tokens are the same. Runs of one seed share their "
        "random numbers, so they part where their distributions first differ enough to change a draw.",
        spec,
    )  # fmt: skip


def _band(name: str, curve: Rows) -> Picture:
    title, unit = BANDS[name]
    rows = [_band_point(row) for row in curve]

    def spec(width: int) -> Spec:
        across = x("x", "token", **token_axis(max(row["to"] for row in rows) - 1))
        up = y("difference", unit)
        given = [row for row in rows if row["low"] is not None]
        area = {"type": "area", "color": RUNS[1], "opacity": 0.28, "interpolate": "monotone"}
        line = {"type": "line", "color": RUNS[1], "strokeWidth": 2.2, "interpolate": "monotone"}
        zero = layer(
            [{"at": 0}], silent({"type": "rule", "color": LIGHT["soft"]}), y={**up, "field": "at"}
        )
        return view(
            [
                zero,
                layer(given, silent(area), x=across, y={**up, "field": "low"}, y2={"field": "high"}),
                layer(rows, silent(line), x=across, y=up),
                told(rows, "from", "to", across),
            ],
            width, HEIGHT,
        )  # fmt: skip

    return Picture(
        f"difference_{name}", "position", f"{title}: difference",
        "The line is the second run's mean less the first's at each position, the band its 95% interval over matched "
        "rows. Where the band leaves 0 the runs differ there.",
        spec,
    )  # fmt: skip


def _band_point(row: dict[str, Any]) -> dict[str, Any]:
    first, last = row["first"] + 1, row["last"] + 1
    means = " and ".join(map(number, row["means"]))
    says = f"tokens {first} to {last}: {means}; difference {number(row['difference'])}"
    if row["low"] is not None:
        says += f" ({number(row['low'])} to {number(row['high'])})"
    ends = {name: row[name] for name in ("difference", "low", "high")}
    return {"x": (first * last) ** 0.5, "from": first, "to": last + 1, "says": says, **ends}


def is_sure(metric: Numbers) -> bool:
    """Whether a difference remains after the adjustment for the number of metrics."""
    return metric["p_holm"] is not None and bool(metric["p_holm"] < SURE)

"""A picture of a report, and the shapes that several share: histograms over each other, means along the text.

Knows rows of numbers and Vega-Lite, no sections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from midlogit.look import LIGHT
from midlogit.report.vega import RUNS, Rows, Spec, layer, silent, token_axis, told, view, x, y

HEIGHT = 230  # pixels


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a report.

    Attributes:
        name: of its files. section: of the page that it belongs to. caption: how it is read, two sentences.
        key: what its colours mean, as (colour, words, whether dashed).
        spec: its Vega-Lite specification at a width in pixels.
    """

    name: str
    section: str
    title: str
    caption: str
    spec: Callable[[int], Spec]
    key: tuple[tuple[str, str, bool], ...] = ()


def histograms(
    series: Sequence[Rows],
    across: Spec,
    name: str,
    *,
    power: bool = False,
    whole: bool = False,
    of: str = "tokens",
    colours: tuple[str, ...] | None = None,
    dashed: bool = False,
) -> list[Spec]:
    """Histograms over each other: the first filled, each with an outline.

    Args:
        power: values are logarithms. whole: edges are whole numbers. dashed: the second outline is dashed.
    """
    colours = colours or (RUNS if len(series) == 2 else (LIGHT["middle"],))
    up = y("share", f"share of {of}", axis={"format": "~%"}, scale={"nice": True})
    layers = []
    for number, (rows, colour) in enumerate(zip(series, colours, strict=False)):
        mark = {
            "type": "bar",
            "color": colour,
            "opacity": 0.75 if len(series) == 1 else 0.28,
            "binSpacing": 1 if len(series) == 1 else 0,
        }
        if number == 0 or not dashed:
            layers.append(
                layer(rows, silent(mark), x=across, x2={"field": "to"}, y=up, y2={"datum": 0})
            )
        if len(series) == 2:
            steps = [*rows, {"from": rows[-1]["to"], "share": 0}] if rows else []
            dash = {"strokeDash": [5, 4]} if dashed and number else {}
            line = {
                "type": "line",
                "interpolate": "step-after",
                "color": colour,
                "strokeWidth": 1.8,
                **dash,
            }
            layers.append(layer(steps, silent(line), x=across, y=up))
    strips = [
        {
            "from": row["from"],
            "to": row["to"],
            "says": f"{name} {_range(row, power, whole)}: {_of_each(series, row)} of {of}",
        }
        for row in _edges(series)
    ]
    return [*layers, told(strips, "from", "to", across)]


def fans(
    series: Sequence[Rows], title: str, name: str, width: int, domain: list[float] | None
) -> Spec:
    """Means along the text with their intervals; for one series also the bands of quantiles."""
    colours = RUNS if len(series) == 2 else (LIGHT["middle"],)
    last = max((row["last"] + 1 for rows in series for row in rows), default=2)
    across = x("x", "token", **token_axis(last))
    drawn = [[_point(row, name) for row in rows] for rows in series]
    up = y(
        "mean",
        title,
        scale={
            "domain": domain if domain and len(series) == 1 else _extent(drawn, domain),
            "nice": True,
        },
    )
    layers, strips = [], []
    for points, colour in zip(drawn, colours, strict=False):
        strips.append(points)
        if len(series) == 1 and points and "q5" in points[0]:
            for low, high, opacity in (("q5", "q95", 0.16), ("q25", "q75", 0.26)):
                band = {
                    "type": "area",
                    "color": colour,
                    "opacity": opacity,
                    "interpolate": "monotone",
                }
                layers.append(
                    layer(
                        points, silent(band), x=across, y={**up, "field": low}, y2={"field": high}
                    )
                )
        interval = {"type": "area", "color": colour, "opacity": 0.35, "interpolate": "monotone"}
        given = [point for point in points if point["low"] is not None]
        layers.append(
            layer(given, silent(interval), x=across, y={**up, "field": "low"}, y2={"field": "high"})
        )
        line = {
            "type": "line",
            "color": colour,
            "strokeWidth": 2.2,
            "interpolate": "monotone",
            "point": {"size": 16, "color": colour, "filled": True},
        }
        layers.append(layer(points, silent(line), x=across, y=up))
    return view(
        [*layers, *(told(points, "from", "to", across) for points in _joined(strips))],
        width,
        HEIGHT,
    )


def percent(share: float | None) -> str:
    """A share as text, with as many digits as it needs."""
    if share is None:
        return "–"
    if share == 0:
        return "0%"
    if share < 1e-4:
        return "<0.01%"
    return f"{100 * share:.3g}%" if share < 0.9995 or share == 1 else f"{100 * share:.2f}%"


def _edges(series: Sequence[Rows]) -> Rows:
    rows = {row["from"]: row for rows in series for row in rows if any(_at(s, row) for s in series)}
    return [rows[edge] for edge in sorted(rows)]


def _at(rows: Rows, wanted: dict[str, Any]) -> float:
    return next((row["share"] or 0.0 for row in rows if row["from"] == wanted["from"]), 0.0)


def _of_each(series: Sequence[Rows], row: dict[str, Any]) -> str:
    return " and ".join(percent(_at(rows, row)) for rows in series)


def _range(row: dict[str, Any], power: bool, whole: bool) -> str:
    if whole:
        last = row["to"] - 1
        return f"{row['from']}" if last == row["from"] else f"{row['from']} to {last}"
    low, high = (10 ** row[end] if power else row[end] for end in ("from", "to"))
    return f"{low:.2g} to {high:.2g}" if power else f"{low:.2f} to {high:.2f}"


def _extent(drawn: Sequence[Rows], domain: list[float] | None) -> list[float]:
    """The least and the largest value that is drawn; from 0 where that is no far way."""
    keys = ("mean", "low", "high", *(("q5", "q95") if len(drawn) == 1 else ()))
    values = [p[key] for points in drawn for p in points for key in keys if p.get(key) is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return [low if domain else min(low, 0.0) if low < 0.5 * high else low, high]


def _point(row: dict[str, Any], name: str) -> dict[str, Any]:
    first, last = row["first"] + 1, row["last"] + 1
    tokens = f"token {first}" if first == last else f"tokens {first} to {last}"
    interval = "" if row["low"] is None else f" ({row['low']:.3g} to {row['high']:.3g})"
    quantiles = row.get("quantiles")
    half = f"; half lie in {quantiles['25']:.3g} to {quantiles['75']:.3g}" if quantiles else ""
    return {
        "x": math.sqrt(first * last), "from": first, "to": last + 1, "mean": row["mean"], "low": row["low"],
        "high": row["high"], "says": f"{tokens}: mean {name} {row['mean']:.3g}{interval}{half}",
        **({f"q{q}": value for q, value in quantiles.items()} if quantiles else {}),
    }  # fmt: skip


def _joined(strips: Sequence[Rows]) -> list[Rows]:
    """One row of strips, whose words are those of both series."""
    if len(strips) == 1:
        return [strips[0]]
    other = {point["from"]: point["says"].split(": ", 1)[1] for point in strips[1]}
    return [[{**p, "says": p["says"] + " · " + other.get(p["from"], "–")} for p in strips[0]]]

"""Vega-Lite specifications in the look of midlogit: axes, marks and scales; knows no numbers of a run.

A specification is plain JSON data, drawn by vl-convert without a browser. Colours are those of `midlogit.look.LIGHT`;
a page puts its own in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from midlogit.look import LIGHT

Spec = dict[str, Any]
Rows = list[dict[str, Any]]

TOLD = "told"  # the name of layers that only answer the pointer
FONT = "Helvetica, Arial, Liberation Sans, sans-serif"
POWERS = (
    "datum.value == 0 ? '1' : datum.value == 1 ? '10' : datum.value == 2 ? '100' : datum.value == -1 ? '0.1'"
    " : datum.value == -2 ? '0.01' : replace('1e' + datum.value, '-', '−')"
)
SIDES = {"base": LIGHT["base"], "teacher": LIGHT["teacher"]}
RUNS = (LIGHT["middle"], LIGHT["other"])


def view(layers: Sequence[Spec], width: int, height: int) -> Spec:
    """A picture of some layers, as wide and high as it is said, axes included."""
    axis = {
        "labelColor": LIGHT["soft"],
        "titleColor": LIGHT["soft"],
        "labelFontSize": 11,
        "titleFontSize": 11.5,
        "titleFontWeight": "normal",
        "gridColor": LIGHT["line"],
        "domainColor": LIGHT["line"],
        "tickColor": LIGHT["line"],
        "labelPadding": 5,
        "titlePadding": 7,
    }
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": width,
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "padding": 2,
        "background": None,
        "layer": list(layers),
        "config": {
            "font": FONT,
            "view": {"stroke": None},
            "axis": axis,
            "axisX": {"grid": False},
            "axisY": {"domain": False, "ticks": False},
            "text": {"color": LIGHT["soft"], "fontSize": 11},
        },
    }


def x(field: str, title: str, **more: Any) -> Spec:
    """A quantitative x channel."""
    axis = {"title": title, "tickCount": 6, "labelFlush": False, **more.pop("axis", {})}
    return {"field": field, "type": "quantitative", "axis": axis, **more}


def y(field: str, title: str, **more: Any) -> Spec:
    """A quantitative y channel; its title is horizontal, above the axis."""
    above = {
        "titleAngle": 0,
        "titleAlign": "left",
        "titleAnchor": "start",
        "titleX": 0,
        "titleY": -12,
    }
    axis = {"title": title, "tickCount": 4, **above, **more.pop("axis", {})}
    return {"field": field, "type": "quantitative", "axis": axis, **more}


def powers(low: float, high: float) -> dict[str, Any]:
    """Scale and labels of logarithms to base 10."""
    step = 1 if high - low <= 6 else 2
    values = [value for value in range(int(low), int(high) + 1) if (value - int(low)) % step == 0]
    return {"scale": {"domain": [low, high]}, "axis": {"values": values, "labelExpr": POWERS}}


def token_axis(last: float) -> dict[str, Any]:
    """Scale and labels of token numbers from 1, in octaves."""
    top = max(last, 2)
    values = [2**k for k in range(20) if 2**k <= top]
    if len(values) > 9:
        values = values[::2]
    return {
        "scale": {"type": "log", "base": 2, "domain": [1, top]},
        "axis": {"values": values, "format": "d"},
    }


def layer(rows: Rows, mark: Spec, **channels: Any) -> Spec:
    """A layer of marks over rows of data."""
    return {"data": {"values": rows}, "mark": {"clip": True, **mark}, "encoding": channels}


def told(rows: Rows, low: str, high: str, x_channel: Spec) -> Spec:
    """Invisible strips from top to bottom that say the `says` of each row under the pointer."""
    channel = {**x_channel, "field": low}
    strips = layer(
        rows,
        {"type": "rect", "opacity": 0, "color": LIGHT["soft"]},
        x=channel,
        x2={"field": high},
        description={"field": "says"},
    )
    return {"name": TOLD, **strips}


def printed(spec: Spec) -> Spec:
    """A specification for paper, on which nobody hovers."""
    return {**spec, "layer": [part for part in spec["layer"] if part.get("name") != TOLD]}


def silent(mark: Spec) -> Spec:
    """A mark that says nothing to who hovers over it or reads by ear."""
    return {"aria": False, **mark}

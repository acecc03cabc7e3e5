"""Draws the pictures of docs/training.md from benchmarks/results/training.json, in the look of `midlogit report`.

python docs/make_curves.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from midlogit.look import LIGHT
from midlogit.report.drawing import drawn
from midlogit.report.vega import Spec, layer, view, x, y

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "training"
GRPO = {
    "own": ("the policy's own", LIGHT["base"]),
    "quarter-nat": ("a quarter of a nat per story (the preset)", LIGHT["middle"]),
    "nat": ("one nat per story", LIGHT["teacher"]),
    "token": ("0.05 nats per token", LIGHT["other"]),
}
DISTILL = {
    "own": ("states of the student", LIGHT["base"]),
    "middle": ("states of q*", LIGHT["middle"]),
    "teacher": ("states of the teacher", LIGHT["teacher"]),
}


def main() -> None:
    curves = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text())
    PICTURES.mkdir(exist_ok=True)
    success = [
        (label, colour, curves[f"grpo-{arm}-{seed}"]["policy/success"])
        for arm, (label, colour) in GRPO.items()
        for seed in (0, 1)
    ]
    write("grpo", picture(success, "success of the policy alone"))
    distance = [
        (label, colour, curves[f"distill-{arm}"]["student/kl_per_token"])
        for arm, (label, colour) in DISTILL.items()
    ]
    write("distill", picture(distance, "KL to the teacher per token, in nats"))


def picture(lines: list[tuple[str, str, dict[str, Any]]], title: str) -> Spec:
    """Lines over steps, one per run; runs of one label share its colour."""
    rows = [
        {"step": step, "value": value, "label": label, "run": run}
        for run, (label, _, curve) in enumerate(lines)
        for step, value in zip(curve["steps"], curve["values"], strict=True)
    ]
    colours = {label: colour for label, colour, _ in lines}
    colour = {
        "field": "label",
        "type": "nominal",
        "scale": {"domain": list(colours), "range": list(colours.values())},
        "legend": {
            "title": None,
            "orient": "bottom",
            "columns": 2,
            "labelColor": LIGHT["soft"],
            "labelFontSize": 12,
            "labelLimit": 400,
            "symbolType": "stroke",
            "symbolStrokeWidth": 3,
        },
    }
    marks = layer(
        rows,
        {"type": "line", "strokeWidth": 2},
        x=x("step", "steps"),
        y=y("value", title, scale={"domainMin": 0}),
        color=colour,
        detail={"field": "run"},
    )
    return {**view([marks], 640, 320), "background": LIGHT["card"], "padding": 14}


def write(name: str, spec: Spec) -> None:
    (PICTURES / f"{name}.svg").write_text(drawn(spec) + "\n")


if __name__ == "__main__":
    main()

"""Learning curves of the recipes in examples/train: arms that differ in whose rollouts they see, side by side.

    python -m benchmarks.training OUT [--device cuda]

Runs every arm whose log is not in OUT yet, all at once, and writes the curves of all of them to
benchmarks/results/training.json, from which docs/make_curves.py draws the pictures of docs/training.md. On one H100 the
arms of a recipe take about six minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "training.json"
GRPO = "--steps 80 --batch 256 --every 5 --evaluate 256"
DISTILL = "--steps 80 --batch 192 --every 10 --repeats 16"
RULES = {
    "own": "--rule fixed:0",
    "quarter-nat": "",
    "nat": "--rule kl-budget:0.0156 --mode sequence_truncate",
    "token": "--rule kl-budget:0.05 --mode token_truncate",
}
ARMS = {
    f"grpo-{name}-{seed}": f"grpo.py {GRPO} {rule} --seed {seed}"
    for name, rule in RULES.items()
    for seed in (0, 1)
}
ARMS |= {
    f"distill-{name}": f"distill.py {DISTILL} --rule {rule}"
    for name, rule in {"own": "fixed:0", "middle": "equal-kl", "teacher": "fixed:1"}.items()
}
CURVES = ("policy/success", "student/kl_per_token", "student/kl_per_text", "reward", "midlogit/kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    for recipe in ("grpo", "distill"):
        running = [
            subprocess.Popen(command(arm, options.out, options.device))
            for arm in ARMS
            if arm.startswith(recipe) and not log_of(arm, options.out).exists()
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            sys.exit(f"An arm of {recipe} failed.")

    curves = {arm: {"command": ARMS[arm], **read(log_of(arm, options.out))} for arm in ARMS}
    RESULTS.write_text(json.dumps(curves, indent=1) + "\n")


def command(arm: str, out: Path, device: str) -> list[str]:
    script, *options = ARMS[arm].split()
    path = f"examples/train/{script}"
    return [sys.executable, path, *options, "--device", device, "--out", str(out / arm)]


def log_of(arm: str, out: Path) -> Path:
    return out / arm / "log.jsonl"


def read(log: Path) -> dict[str, Any]:
    """Steps and values of each curve that a log has, without steps logged twice."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    found = {}
    for name in CURVES:
        points = {entry["step"]: float(entry[name]) for entry in entries if name in entry}
        if points:
            found[name] = {"steps": list(points), "values": [round(v, 4) for v in points.values()]}
    return found


if __name__ == "__main__":
    main()

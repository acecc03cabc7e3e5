"""Logs a report to trackio or wandb, which take the same calls: scalars, histograms, rows; knows neither's inside."""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Literal

import numpy as np

from midlogit.errors import MissingExtra
from midlogit.report.numbers import Numbers
from midlogit.report.results import Results

Tracker = Literal["trackio", "wandb"]
EXAMPLES = 500
ROWS = [
    "row_id", "sample", "prompt", "text", "finish_reason", "completion_tokens", "mean_alpha", "mean_kl_base",
    "mean_kl_teacher", "max_kl",
]  # fmt: skip
HISTOGRAMS = {
    "alpha": ("alpha", "histogram"),
    "log10 KL to the base": ("kl", "base", "histogram"),
    "log10 KL to the teacher": ("kl", "teacher", "histogram"),
    "repetition": ("lengths", "repetition_histogram"),
}


def log_run(tracker: Tracker, project: str, run: Numbers, results: Results) -> None:
    """Logs one run: its means and shares, its histograms, and at most `EXAMPLES` rows drawn at random.

    Raises:
        MissingExtra: the tracker is not installed.
    """
    try:
        module: Any = import_module(tracker)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{tracker} is not installed.", f"Run: pip install {tracker}") from error

    job = run["head"]["job"]
    module.init(project=project, name=run["head"]["name"], config=job and {**job})
    module.log(
        {**dict(scalars(run)), **_histograms(module, run), "examples": _examples(module, results)}
    )
    module.finish()


def scalars(run: Numbers) -> Iterator[tuple[str, float]]:
    """(name, value) of the numbers that stand for a whole run."""
    for name in ("completions", "rows", "errors", "completion_tokens"):
        yield f"head/{name}", run["head"][name]
    for section in ("alpha", "kl", "ess", "lengths", "exactness"):
        yield from _leaves(section, run[section])


def _leaves(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The single numbers below a name; lists, which are histograms and curves, are left out."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(f"{name}/{key}", part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _histograms(module: Any, run: Numbers) -> dict[str, Any]:
    found = {}
    for name, path in HISTOGRAMS.items():
        rows: Any = run
        for key in path:
            rows = rows and rows[key]
        if rows:
            edges = [row["from"] for row in rows] + [rows[-1]["to"]]
            shares = [row["share"] or 0.0 for row in rows]
            found[name] = module.Histogram(np_histogram=(np.array(shares), np.array(edges)))
    return found


def _examples(module: Any, results: Results) -> Any:
    """Rows drawn at random, from as many parts as are sampled."""
    parts = results.sampled_parts()
    each = -(-EXAMPLES // max(len(parts), 1))
    rows: list[list[Any]] = []
    for part in parts:
        table = results.parts[part].table([*ROWS, "error"])
        table = table.filter(table["error"].is_null()).select(ROWS)
        chosen = random.Random(part).sample(range(len(table)), min(each, len(table)))
        rows += [list(row.values()) for row in table.take(sorted(chosen)).to_pylist()]
    return module.Table(columns=ROWS, data=rows[:EXAMPLES])

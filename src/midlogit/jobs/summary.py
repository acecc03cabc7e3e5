"""Summaries of results that merge, one in the footer of each part; knows the columns of results and how to add.

They hold counts, sums and squares by clusters of prompts, histograms by position, weights of sequences, the positions
where the models disagree most, and a few rows by hash and at the extremes. A report of any number of rows reads footers
alone, of a running job as well. `midlogit.jobs.measures` makes the numbers; this module merges them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from midlogit.jobs.measures import (
    METRICS,
    Flat,
    cluster_sums,
    clusters_of,
    completion_values,
    counted,
    histogram,
    length_bins,
    log10,
    position_measures,
    sequence_weights,
    token_measures,
)
from midlogit.jobs.schema import TOP_SIDES

if TYPE_CHECKING:
    import pyarrow as pa

SUMMARY_VERSION = 2  # of what a summary holds; readers make an older one again from its rows
HIGHEST, EXAMPLES, CONTEXT, CANDIDATES = 50, 20, 16, 4
EXTREMES = 3  # rows at each end
KINDS, MESSAGES = 50, 5  # most kinds of errors of a part, and messages of each

Summary = dict[str, Any]


def summarize(table: pa.Table) -> Summary:
    """The summary of a table of results."""
    done = table.filter(table.column("error").is_null())
    errors = [e for e in table.column("error").to_pylist() if e is not None]
    values, flat = completion_values(done), Flat(done)
    cluster = clusters_of(done)
    lengths = values["completion_tokens"]
    return {
        "completions": len(table),
        "rows": len(set(table.column("row_id").to_pylist())),
        "prompt_tokens": _total(table, "prompt_tokens"),
        "completion_tokens": _total(table, "completion_tokens"),
        "finish_reasons": dict(Counter(table.column("finish_reason").to_pylist())),
        "errors": len(errors),
        "error_examples": list(dict.fromkeys(errors))[:MESSAGES],
        "error_kinds": _error_kinds(table),
        "metrics": {name: cluster_sums(values[name], cluster) for name in METRICS},
        "histograms": {
            "lengths": counted(length_bins(lengths[lengths > 0])),
            "log10_max_kl": histogram(log10(_given(values["max_kl"])), "log10_max_kl"),
            "repetition": histogram(_given(values["repetition"]), "repetition"),
        },
        "identical": _identical(done),
        "weights": sequence_weights(values),
        "tokens": token_measures(done, flat),
        "positions": position_measures(done, flat),
        "highest_kl": _highest_kl(done, flat),
        "examples": _examples(done),
        "extremes": _extremes(done, values),
    }


def merge(summaries: Iterable[Summary]) -> Summary:
    """The summary of all results together."""
    total: Summary = {}
    for summary in summaries:
        add(total, summary)
        total["error_examples"] = list(dict.fromkeys(total["error_examples"]))[:MESSAGES]
        total["highest_kl"] = sorted(total["highest_kl"], key=lambda p: -p["kl"])[:HIGHEST]
        total["examples"] = sorted(total["examples"], key=lambda e: e["hash"])[:EXAMPLES]
        for name, rows in total["extremes"].items():
            total["extremes"][name] = _furthest(name, rows)
        for kind in total["error_kinds"].values():
            kind["examples"] = kind["examples"][:MESSAGES]
    return total


def add(total: Summary, other: Summary) -> None:
    """Adds a summary to a total in place, as `midlogit.jobs.measures` says."""
    for name, value in other.items():
        if isinstance(value, dict):
            add(total.setdefault(name, {}), value)
        elif isinstance(value, list):
            total[name] = total.get(name, []) + value
        elif name.startswith("max_"):
            total[name] = max(total.get(name, value), value)
        elif name.startswith("log_"):
            total[name] = _log_add(total[name], value) if name in total else value
        else:
            total[name] = total.get(name, 0) + value


def _log_add(one: float, other: float) -> float:
    larger, smaller = max(one, other), min(one, other)
    return larger + math.log1p(math.exp(smaller - larger))


def _total(table: pa.Table, column: str) -> int:
    return int(np.sum(table.column(column).to_numpy()))


def _given(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    given: np.ndarray[Any, Any] = values[~np.isnan(values)]
    return given


def _identical(done: pa.Table) -> dict[str, int]:
    """Of rows with several completions: how many these are, and how many say what another of the row says."""
    texts: dict[str, list[str]] = {}
    names, written = done.column("row_id").to_pylist(), done.column("text").to_pylist()
    for name, text in zip(names, written, strict=True):
        texts.setdefault(name, []).append(text)
    several = [row for row in texts.values() if len(row) > 1]
    return {
        "rows": len(several),
        "completions": sum(map(len, several)),
        "repeated": sum(len(row) - len(set(row)) for row in several),
    }


def _error_kinds(table: pa.Table) -> dict[str, Any]:
    """Errors by kind: messages that are equal but for numbers and quoted parts, the place in the input left out."""
    wrong = table.filter(table.column("error").is_valid()).select(["row_id", "sample", "error"])
    found: dict[str, Any] = {}
    for row in wrong.to_pylist():
        kind = re.sub(r"^\S+:\d+: ", "", row["error"])
        kind = re.sub(r"\d[\d,.]*\d|\d", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", kind))[:200]
        if kind not in found and len(found) == KINDS:
            kind = "other errors"
        entry = found.setdefault(kind, {"count": 0, "examples": []})
        entry["count"] += 1
        entry["examples"] += [row][: MESSAGES - len(entry["examples"])]
    return found


def _highest_kl(done: pa.Table, flat: Flat) -> list[dict[str, Any]]:
    """The unforced positions where the models disagree most, with the tokens before them and candidates."""
    if "alpha" not in done.column_names:
        return []

    kl = np.maximum(flat.column("kl_base"), flat.column("kl_teacher"))
    kl = np.where(flat.column("forced") | ~np.isfinite(kl), -1.0, kl)
    most = np.argpartition(-kl, HIGHEST)[:HIGHEST] if len(kl) > HIGHEST else np.arange(len(kl))
    most = most[kl[most] >= 0]
    return [
        _place(done, int(flat.row[at]), int(flat.position[at]), float(kl[at]))
        for at in most[np.argsort(-kl[most], kind="stable")]
    ]


def _place(done: pa.Table, row: int, position: int, kl: float) -> dict[str, Any]:
    ids = done.column("token_ids")[row].as_py()
    place = {
        "row_id": done.column("row_id")[row].as_py(),
        "sample": done.column("sample")[row].as_py(),
        "position": position,
        "kl": kl,
        "alpha": done.column("alpha")[row][position].as_py(),
        "token_ids": ids[max(position - CONTEXT, 0) : position + 1],
    }
    for name in ("logprob", "base_logprob", "teacher_logprob"):
        value = done.column(f"{name}s")[row][position].as_py()
        place[name] = value if math.isfinite(value) else None
    if "top_q_ids" in done.column_names:
        place["top"] = {
            side: [
                list(pair)
                for pair in zip(
                    done.column(f"top_{side}_ids")[row][position].as_py()[:CANDIDATES],
                    done.column(f"top_{side}_logprobs")[row][position].as_py()[:CANDIDATES],
                    strict=True,
                )
            ]
            for side in TOP_SIDES
        }
    return place


def _examples(done: pa.Table) -> list[dict[str, Any]]:
    """Completions whose hash is smallest: the same random ones whatever the order of parts."""
    names, samples = done.column("row_id").to_pylist(), done.column("sample").to_pylist()
    hashes = [
        hashlib.blake2b(f"{name}\0{sample}".encode(errors="replace"), digest_size=8).hexdigest()
        for name, sample in zip(names, samples, strict=True)
    ]
    chosen = sorted(range(len(hashes)), key=hashes.__getitem__)[:EXAMPLES]
    return [{"hash": hashes[row], "row_id": names[row], "sample": samples[row]} for row in chosen]


def _extremes(done: pa.Table, values: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Completions with the highest mean KL, and those that one model finds likelier than the other, per token."""
    tokens = np.maximum(values["completion_tokens"], 1)
    towards = (values["sum_teacher_logprob"] - values["sum_base_logprob"]) / tokens
    kl = np.fmax(values["mean_kl_base"], values["mean_kl_teacher"])
    measured = {"highest_kl": kl, "nearest_base": towards, "nearest_teacher": towards}
    return {
        name: _furthest(
            name,
            [
                {
                    "value": float(measure[row]),
                    "row_id": done.column("row_id")[int(row)].as_py(),
                    "sample": done.column("sample")[int(row)].as_py(),
                }
                for row in _ends(measure)
            ],
        )
        for name, measure in measured.items()
    }


def _ends(values: np.ndarray[Any, Any]) -> list[int]:
    """The rows with the smallest and the largest finite values."""
    given = np.flatnonzero(np.isfinite(values))
    order = given[np.argsort(values[given], kind="stable")]
    return sorted({*order[:EXTREMES].tolist(), *order[-EXTREMES:].tolist()})


def _furthest(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sign = 1 if name == "nearest_base" else -1
    return sorted(rows, key=lambda row: (sign * row["value"], row["row_id"], row["sample"]))[
        :EXTREMES
    ]

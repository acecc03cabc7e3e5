"""Summaries of results that merge by addition, one in the footer of each part; knows the columns of results.

They hold counts, sums and squares by clusters of prompts, histograms by position, the positions where the models
disagree most, and a few rows by hash. A report of any number of rows reads footers alone, of a running job as well.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from midlogit.jobs.schema import SCALARS

if TYPE_CHECKING:
    import pyarrow as pa

METRICS = ("completion_tokens", *SCALARS)
POSITION_SUMS = ("alpha", "kl_base", "kl_teacher", "entropy", "tv_bound", "coverage")
BINS = 200
RANGES = {  # of the values of a histogram; of logarithms to base 10 where the name says so
    "alpha": (0.0, 1.0),
    "log10_kl_base": (-8.0, 2.0),
    "log10_kl_teacher": (-8.0, 2.0),
    "entropy": (0.0, 12.0),
    "log10_tv_bound": (-8.0, 0.0),
}
HIGHEST, EXAMPLES, CONTEXT = 50, 20, 16

Summary = dict[str, Any]


def summarize(table: pa.Table) -> Summary:
    """The summary of a table of results."""
    done = table.filter(table.column("error").is_null())
    errors = [e for e in table.column("error").to_pylist() if e is not None]
    return {
        "completions": len(table),
        "rows": len(set(table.column("row_id").to_pylist())),
        "prompt_tokens": _total(table, "prompt_tokens"),
        "completion_tokens": _total(table, "completion_tokens"),
        "finish_reasons": dict(Counter(table.column("finish_reason").to_pylist())),
        "errors": len(errors),
        "error_examples": list(dict.fromkeys(errors))[:5],
        "metrics": _metrics(done),
        "positions": _positions(done),
        "highest_kl": _highest_kl(done),
        "examples": _examples(done),
    }


def merge(summaries: Iterable[Summary]) -> Summary:
    """The summary of all results together."""
    total: Summary = {}
    for summary in summaries:
        total = _added(total, summary) if total else summary
        total["error_examples"] = total["error_examples"][:5]
        total["highest_kl"] = sorted(total["highest_kl"], key=lambda p: -p["kl"])[:HIGHEST]
        total["examples"] = sorted(total["examples"], key=lambda e: e["hash"])[:EXAMPLES]
    return total


def _added(one: Any, other: Any) -> Any:
    """Sums of numbers, concatenations of lists, unions of mappings."""
    if isinstance(one, dict):
        return {
            key: _added(one[key], other[key])
            if key in one and key in other
            else one.get(key, other.get(key))
            for key in {**one, **other}
        }
    return one + other


def _total(table: pa.Table, column: str) -> int:
    return int(np.sum(table.column(column).to_numpy()))


def _metrics(done: pa.Table) -> dict[str, dict[str, float]]:
    """Per metric sums over completions and over clusters, the samples of one row, for cluster-robust errors.

    Of values x in clusters c of n_c with the sum s_c: count, sum, sum of squares, clusters, Σ s_c², Σ n_c s_c, Σ n_c².
    """
    _, cluster = np.unique(np.asarray(done.column("row_id").to_pylist(), str), return_inverse=True)
    found = {}
    for name in METRICS:
        x = done.column(name).to_numpy().astype(float)
        is_given = np.isfinite(x)
        sums = np.bincount(cluster[is_given], x[is_given])
        counts = np.bincount(cluster[is_given]).astype(float)
        found[name] = {
            "count": float(counts.sum()),
            "sum": float(sums.sum()),
            "squares": float(np.square(x[is_given]).sum()),
            "clusters": float((counts > 0).sum()),
            "cluster_squares": float(np.square(sums).sum()),
            "cluster_products": float((counts * sums).sum()),
            "cluster_sizes": float(np.square(counts).sum()),
        }
    return found


def _positions(done: pa.Table) -> dict[str, dict[str, Any]]:
    """Per bin of positions: tokens, sums of the diagnostics, and their histograms as {bin: count}."""
    if "alpha" not in done.column_names:
        return {}

    columns = {name: _flat(done, name) for name in POSITION_SUMS}
    lengths = done.column("alpha").combine_chunks().value_lengths().to_numpy()
    positions = np.concatenate([np.arange(n) for n in lengths]) if len(lengths) else np.empty(0)
    bins = np.frexp(positions)[1]  # 0, 1, 2 to 3, 4 to 7 and so on: the bit length of a position
    values = {
        "alpha": columns["alpha"],
        "log10_kl_base": _log10(columns["kl_base"]),
        "log10_kl_teacher": _log10(columns["kl_teacher"]),
        "entropy": columns["entropy"],
        "log10_tv_bound": _log10(columns["tv_bound"]),
    }
    forced = _flat(done, "forced")
    found = {}
    for number in np.unique(bins):
        inside = bins == number
        found[str(number)] = {
            "tokens": int(inside.sum()),
            "forced": int(forced[inside].sum()),
            "sums": {name: float(column[inside].sum()) for name, column in columns.items()},
            "histograms": {
                name: _histogram(value[inside], RANGES[name]) for name, value in values.items()
            },
        }
    return found


def _histogram(values: np.ndarray[Any, Any], bounds: tuple[float, float]) -> dict[str, int]:
    """Counts by the number of the bin, values outside counted in the first and the last."""
    low, high = bounds
    scaled = (np.nan_to_num(values, nan=low) - low) / (high - low) * BINS
    counts = np.bincount(np.clip(scaled, 0, BINS - 1).astype(int))
    return {str(number): int(count) for number, count in enumerate(counts) if count}


def _highest_kl(done: pa.Table) -> list[dict[str, Any]]:
    """The positions where the models disagree most, with the tokens before them."""
    if "alpha" not in done.column_names or not len(done):
        return []

    kl = np.maximum(_flat(done, "kl_base"), _flat(done, "kl_teacher"))
    starts = np.concatenate(
        ([0], np.cumsum(done.column("alpha").combine_chunks().value_lengths().to_numpy()))
    )
    found = []
    for at in np.argsort(-kl, kind="stable")[:HIGHEST]:
        row = int(np.searchsorted(starts, at, side="right")) - 1
        position = int(at - starts[row])
        ids = done.column("token_ids")[row].as_py()
        found.append(
            {
                "row_id": done.column("row_id")[row].as_py(),
                "sample": done.column("sample")[row].as_py(),
                "position": position,
                "kl": float(kl[at]),
                "alpha": done.column("alpha")[row][position].as_py(),
                "logprob": done.column("logprobs")[row][position].as_py(),
                "base_logprob": done.column("base_logprobs")[row][position].as_py(),
                "teacher_logprob": done.column("teacher_logprobs")[row][position].as_py(),
                "token_ids": ids[max(position - CONTEXT, 0) : position + 1],
            }
        )
    return found


def _examples(done: pa.Table) -> list[dict[str, Any]]:
    """Completions whose hash is smallest: the same random ones whatever the order of parts."""
    names, samples = done.column("row_id").to_pylist(), done.column("sample").to_pylist()
    hashes = [
        hashlib.blake2b(f"{name}\0{sample}".encode(errors="replace"), digest_size=8).hexdigest()
        for name, sample in zip(names, samples, strict=True)
    ]
    chosen = sorted(range(len(hashes)), key=hashes.__getitem__)[:EXAMPLES]
    return [{"hash": hashes[row], "row_id": names[row], "sample": samples[row]} for row in chosen]


def _flat(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    """The values of a column of lists, one after another."""
    column = table.column(name).combine_chunks()
    values: np.ndarray[Any, Any] = column.flatten().to_numpy(zero_copy_only=False)
    return values


def _log10(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    logarithms: np.ndarray[Any, Any] = np.log10(np.maximum(values, 1e-30))
    return logarithms

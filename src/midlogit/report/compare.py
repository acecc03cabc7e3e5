"""Two runs compared: completions matched by (row, sample), differences with intervals, where texts part.

Knows results and statistics, no page. Scalars are compared over all matched completions; what needs the lists of each
token (effective sample sizes, repetition, positions, texts) over those in a random sample of parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from midlogit.errors import InvalidRequest
from midlogit.jobs.measures import Flat, mean_ess, position_bins, repetition
from midlogit.report.differing import differing
from midlogit.report.numbers import Numbers, first_position
from midlogit.report.results import Results
from midlogit.report.statistics import (
    holm,
    paired_difference,
    ratio_difference,
    t_quantile,
    welch_difference,
)

if TYPE_CHECKING:
    import pyarrow as pa

Array = np.ndarray[Any, Any]

KEYS = ["row_id", "sample"]
SCALARS = (
    "mean_alpha", "mean_kl_base", "mean_kl_teacher", "max_kl", "mean_entropy", "completion_tokens", "sum_logprob",
    "sum_base_logprob", "sum_teacher_logprob", "sum_tv_bound",
)  # fmt: skip
METRICS = {
    "mean_alpha": "mean α, forced included",
    "mean_kl_base": "mean KL to the base",
    "mean_kl_teacher": "mean KL to the teacher",
    "max_kl": "largest KL",
    "mean_entropy": "mean entropy",
    "completion_tokens": "length in tokens",
    "stopped": "ended by itself",
    "logprob": "log q per token",
    "base_logprob": "log base per token",
    "teacher_logprob": "log teacher per token",
    "sum_tv_bound": "bound on the text's TV",
}
SAMPLED = {
    "mean_ess_base": "ESS per token, base",
    "mean_ess_teacher": "ESS per token, teacher",
    "repetition": "repeated 4-grams",
}
UNMATCHED = {
    name: label for name, label in METRICS.items() if not name.endswith("logprob")
} | SAMPLED
CURVES = ("alpha", "kl_base", "entropy")
LISTS = [
    "row_id",
    "sample",
    "error",
    "token_ids",
    "finish_reason",
    "forced",
    "ess_base",
    "ess_teacher",
    *CURVES,
]
SEVERAL_PARTS = 16


@dataclass(frozen=True, slots=True)
class Scalars:
    """The finished completions of a run.

    Attributes:
        keys: a table of row_id, sample and the `number` of each. values: by metric, (completions,).
        part: (completions,) number of the part of each.
    """

    keys: pa.Table
    values: dict[str, Array]
    part: Array


@dataclass(frozen=True, slots=True)
class Matched:
    """Completions that both runs have.

    Attributes:
        first, second: their numbers in each run. cluster: the number of their row.
    """

    first: Array
    second: Array
    cluster: Array


def comparison(first: Results, second: Results) -> Numbers:
    """The numbers of two runs side by side.

    Raises:
        InvalidRequest: a run has a completion twice.
    """
    one, two = scalars(first), scalars(second)
    matched = match(one.keys, two.keys)
    pairs = len(matched.first)
    found: Numbers = {
        "matched": pairs,
        "rows": len(np.unique(matched.cluster)),
        "only_first": len(one.part) - pairs,
        "only_second": len(two.part) - pairs,
        "differing": differing(first, second),
        "same_seed": _seed(first) is not None and _seed(first) == _seed(second),
        "sample": None,
        "by_position": None,
        "texts": None,
    }
    if not pairs:
        return found | {"metrics": _adjusted(list(_unmatched(first, second)))}

    metrics = [
        _paired(
            name,
            label,
            one.values[name][matched.first],
            two.values[name][matched.second],
            matched.cluster,
        )
        for name, label in METRICS.items()
    ]
    sample = sampled(first, second, one, two, matched)
    if sample is not None:
        metrics += sample.pop("metrics")
        found |= sample
    return found | {"metrics": _adjusted([m for m in metrics if m is not None])}


def scalars(results: Results) -> Scalars:
    """Reads the scalars of all finished completions."""
    import pyarrow as pa
    import pyarrow.compute as pc

    tables, parts = [], []
    for number, part in enumerate(results.parts):
        table = part.table([*KEYS, "error", "finish_reason", *SCALARS])
        table = table.filter(table["error"].is_null())
        stopped = pc.cast(pc.equal(table["finish_reason"], "stop"), pa.float64())
        tables.append(
            table.drop_columns(["error", "finish_reason"]).append_column("stopped", stopped)
        )
        parts.append(np.full(len(table), number, np.int32))

    if not tables:
        empty = pa.table({"row_id": pa.array([], pa.string()), "sample": pa.array([], pa.int32())})
        return Scalars(_numbered(empty), {name: np.empty(0) for name in METRICS}, np.empty(0, int))
    whole = pa.concat_tables(tables)
    values = {name: whole[name].to_numpy().astype(float) for name in (*SCALARS, "stopped")}
    tokens = np.maximum(values["completion_tokens"], 1)
    for name in ("logprob", "base_logprob", "teacher_logprob"):
        values[name] = values.pop(f"sum_{name}") / tokens
    return Scalars(_numbered(whole.select(KEYS)), values, np.concatenate(parts))


def match(first: pa.Table, second: pa.Table) -> Matched:
    """Completions with the same (row, sample), in the order of the first run.

    Raises:
        InvalidRequest: a key occurs twice.
    """
    joined = first.join(second, KEYS, join_type="inner", right_suffix="_second")
    joined = joined.sort_by("number")
    numbers = [joined[name].to_numpy() for name in ("number", "number_second")]
    if any(len(np.unique(of_run)) < len(joined) for of_run in numbers):
        raise InvalidRequest(
            "A run has a completion of the same row and sample twice.",
            "Compare runs of one call each.",
        )
    coded = joined["row_id"].combine_chunks().dictionary_encode()
    return Matched(numbers[0], numbers[1], coded.indices.to_numpy(zero_copy_only=False))


def sampled(
    first: Results, second: Results, one: Scalars, two: Scalars, matched: Matched
) -> Numbers | None:
    """What needs the lists of each token, over the matched completions of a random sample of parts."""
    chosen = np.isin(one.part[matched.first], first.sampled_parts(SEVERAL_PARTS))
    first_numbers, second_numbers = matched.first[chosen], matched.second[chosen]
    if not len(first_numbers):
        return None
    cluster = matched.cluster[chosen]
    sides = [
        lists_of(results, of_run, numbers)
        for results, of_run, numbers in ((first, one, first_numbers), (second, two, second_numbers))
    ]
    values = [list_metrics(side) for side in sides]
    metrics = [
        _paired(name, label, values[0][name], values[1][name], cluster)
        for name, label in SAMPLED.items()
    ]
    has_lists = first.has_lists and second.has_lists
    return {
        "metrics": metrics,
        "sample": {
            "pairs": len(cluster),
            "parts": len(np.unique(one.part[first_numbers])),
            "of": len(first.parts),
        },
        "by_position": {name: curve(sides[0], sides[1], name, cluster) for name in CURVES}
        if has_lists
        else None,
        "texts": partings(sides[0]["token_ids"], sides[1]["token_ids"]),
    }


def lists_of(results: Results, of_run: Scalars, numbers: Array) -> pa.Table:
    """The lists of some completions, in the order of their numbers."""
    import pyarrow as pa

    begins = np.searchsorted(of_run.part, np.arange(len(results.parts)))
    tables, order = [], []
    for part in np.unique(of_run.part[numbers]):
        table = results.parts[part].table(LISTS)
        table = table.filter(table["error"].is_null())
        wanted = np.flatnonzero(of_run.part[numbers] == part)
        tables.append(table.take(pa.array(numbers[wanted] - begins[part])))
        order.append(wanted)
    return pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(order))))


def list_metrics(table: pa.Table) -> dict[str, Array]:
    """The metrics of completions that need lists."""
    flat = Flat(table)
    found = {
        f"mean_ess_{side}": mean_ess(table, flat, f"ess_{side}") for side in ("base", "teacher")
    }
    return found | {"repetition": repetition(flat)}


def curve(first: pa.Table, second: pa.Table, name: str, cluster: Array) -> list[Numbers]:
    """Means of both runs over bins of positions, and their difference with its interval."""
    _, cluster = np.unique(cluster, return_inverse=True)
    bins, sums = zip(*(_by_bin(table, name, cluster) for table in (first, second)), strict=True)
    found = []
    for number in sorted(set(bins[0]) & set(bins[1])):
        one, two = sums[0][number], sums[1][number]
        difference, error = ratio_difference(one, two)
        clusters = int(((one[1] > 0) | (two[1] > 0)).sum())
        margin = t_quantile(clusters - 1) * error if error is not None else None
        found.append(
            {
                "first": first_position(number),
                "last": first_position(number + 1) - 1,
                "means": [float(x.sum() / n.sum()) for x, n in (one, two)],
                "difference": difference,
                "low": None if margin is None else difference - margin,
                "high": None if margin is None else difference + margin,
                "clusters": clusters,
            }
        )
    return found


def partings(first: pa.ChunkedArray, second: pa.ChunkedArray) -> Numbers:
    """Where the token ids of pairs part: identical ones never do."""
    positions = np.array(
        [
            _parting(a.values.to_numpy(), b.values.to_numpy())
            for a, b in zip(first, second, strict=True)
        ],
        float,
    )
    apart = positions[np.isfinite(positions)]
    last = int(apart.max(initial=0))
    edges = [first_position(number) for number in range(2 * last.bit_length() + 3) if number != 1]
    edges = [edge for edge in edges if edge <= last] + [last + 1]
    return {
        "pairs": len(positions),
        "identical": float(1 - len(apart) / len(positions)),
        "median": float(np.median(apart)) if len(apart) else None,
        "together": [
            {"tokens": edge, "share": float((positions >= edge).mean())} for edge in edges
        ],
    }


def _seed(results: Results) -> int | None:
    return results.manifest.params.seed if results.manifest else None


def _numbered(keys: pa.Table) -> pa.Table:
    import pyarrow as pa

    return keys.append_column("number", pa.array(np.arange(len(keys))))


def _paired(name: str, label: str, first: Array, second: Array, cluster: Array) -> Numbers | None:
    """A metric of both runs and its difference; None where it has no values, or never any but one."""
    given = np.isfinite(first) & np.isfinite(second)
    a, b = first[given], second[given]
    if not len(a) or (name == "sum_tv_bound" and not (a.any() or b.any())):
        return None
    spread = np.sqrt((a.var() + b.var()) / 2)
    found = paired_difference(b - a, cluster[given])
    is_flat = min(a.std(), b.std()) == 0
    return {
        "name": name,
        "label": label,
        "first": float(a.mean()),
        "second": float(b.mean()),
        **found,
        "effect": float(found["difference"] / spread) if spread else 0.0,
        "correlation": None if is_flat else float(np.corrcoef(a, b)[0, 1]),
    }


def _unmatched(first: Results, second: Results) -> Iterator[Numbers]:
    """Metrics of runs without a common completion, from their summaries."""
    for name, label in UNMATCHED.items():
        one, two = (run.summary.get("metrics", {}).get(name) for run in (first, second))
        if not (one and two and one["count"] and two["count"]):
            continue
        variances = [
            max(s["squares"] / s["count"] - (s["sum"] / s["count"]) ** 2, 0.0) for s in (one, two)
        ]
        spread = (sum(variances) / 2) ** 0.5
        if name == "sum_tv_bound" and not (one["squares"] or two["squares"]):
            continue
        found = welch_difference(one, two)
        yield {
            "name": name,
            "label": label,
            "first": one["sum"] / one["count"],
            "second": two["sum"] / two["count"],
            **found,
            "effect": found["difference"] / spread if spread else 0.0,
            "correlation": None,
        }


def _adjusted(metrics: list[Numbers]) -> list[Numbers]:
    adjusted = holm([metric["p"] for metric in metrics])
    return [metric | {"p_holm": p} for metric, p in zip(metrics, adjusted, strict=True)]


def _by_bin(
    table: pa.Table, name: str, cluster: Array
) -> tuple[Array, dict[int, tuple[Array, Array]]]:
    """The bins of positions of a run's unforced tokens, and in each the sums and counts of each cluster."""
    column = table[name].combine_chunks()
    lengths = column.value_lengths().to_numpy()
    values = column.flatten().to_numpy(zero_copy_only=False).astype(float)
    forced = table["forced"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    positions = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    free = ~forced & np.isfinite(values)
    bins, groups = position_bins(positions)[free], np.repeat(cluster, lengths)[free]
    values = values[free]
    size = int(cluster.max()) + 1
    sums = {
        int(number): (
            np.bincount(groups[bins == number], values[bins == number], minlength=size),
            np.bincount(groups[bins == number], minlength=size).astype(float),
        )
        for number in np.unique(bins)
    }
    return np.array(list(sums)), sums


def _parting(first: Array, second: Array) -> float:
    """The first position at which two lists of ids differ; infinite for equal lists."""
    shorter = min(len(first), len(second))
    unequal = np.flatnonzero(first[:shorter] != second[:shorter])
    if len(unequal):
        return float(unequal[0])
    return float("inf") if len(first) == len(second) else float(shorter)

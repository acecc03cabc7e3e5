"""What a part's results are measured by: sums by clusters of prompts, histograms, weights; knows columns, no footers.

Every measure of two disjoint sets of rows adds up to that of both: numbers by addition, names that begin with log_ by
the logarithm of the sum, those with max_ by the larger. A cluster is the samples of one row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from midlogit.jobs.schema import SCALARS

if TYPE_CHECKING:
    import pyarrow as pa

Array = np.ndarray[Any, Any]
Measures = dict[str, Any]

RATIOS = ("stopped", "repetition", "mean_ess_base", "mean_ess_teacher")
LOG_WEIGHTS = ("base_log_weight", "teacher_log_weight")
METRICS = ("completion_tokens", *SCALARS, *RATIOS, *LOG_WEIGHTS)  # of a completion
FREE = ("alpha", "kl_base", "kl_teacher", "entropy", "ess_base", "ess_teacher")  # unforced tokens
SEEN = ("coverage", "tv_bound", "alpha_bound")  # of all tokens

BINS = 200
RANGES = {  # of histograms; of logarithms to base 10 where the name says so
    "alpha": (0.0, 1.0),
    "log10_kl_base": (-8.0, 2.0),
    "log10_kl_teacher": (-8.0, 2.0),
    "entropy": (0.0, 12.0),
    "log10_tv_bound": (-8.0, 0.0),
    "coverage": (0.0, 1.0),
    "ess_base": (0.0, 1.0),
    "ess_teacher": (0.0, 1.0),
    "log10_difference": (-12.0, 3.0),
    "log10_max_kl": (-8.0, 2.0),
    "repetition": (0.0, 1.0),
}
BY_POSITION = ("alpha", "log10_kl_base", "log10_kl_teacher", "entropy")
ALPHA_STEPS, ENTROPY_STEPS, ENTROPY_MOST = 25, 24, 6.0  # of the table of α by entropy
LENGTHS_PER_OCTAVE = 4
GRAM = 4  # tokens in a row that count as repeated


class Flat:
    """The tokens of finished completions one after another.

    Attributes:
        lengths, row, position: tokens of each completion; the completion and the position of each token.
        cluster: the number of each completion's cluster.
    """

    def __init__(self, done: pa.Table) -> None:
        self._done = done
        ids = done.column("token_ids").combine_chunks()
        self.lengths: Array = ids.value_lengths().to_numpy()
        self.row: Array = np.repeat(np.arange(len(done)), self.lengths)
        starts = np.cumsum(self.lengths) - self.lengths
        self.position: Array = np.arange(len(self.row)) - np.repeat(starts, self.lengths)
        self.cluster: Array = clusters_of(done)

    def column(self, name: str) -> Array:
        """The values of a column of lists."""
        column = self._done.column(name).combine_chunks()
        values: Array = column.flatten().to_numpy(zero_copy_only=False)
        return values


def clusters_of(table: pa.Table) -> Array:
    """The number of each completion's cluster: completions of one row have the same."""
    coded = table.column("row_id").combine_chunks().dictionary_encode()
    numbers: Array = coded.indices.to_numpy(zero_copy_only=False)
    return numbers


def cluster_sums(values: Array, cluster: Array) -> Measures:
    """What means and cluster-robust errors need of values x in clusters c of n_c with the sum s_c; finite ones only.

    Returns:
        count, sum, sum of squares, clusters, Σ s_c², Σ n_c s_c, Σ n_c².
    """
    x = values.astype(np.float64)
    is_given = np.isfinite(x)
    x, cluster = x[is_given], cluster[is_given]
    sums, counts = np.bincount(cluster, x), np.bincount(cluster).astype(float)
    return {
        "count": float(counts.sum()),
        "sum": float(sums.sum()),
        "squares": float(np.square(x).sum()),
        "clusters": float((counts > 0).sum()),
        "cluster_squares": float(np.square(sums).sum()),
        "cluster_products": float((counts * sums).sum()),
        "cluster_sizes": float(np.square(counts).sum()),
    }


def histogram(values: Array, name: str) -> dict[str, int]:
    """Counts by the number of the bin; values outside count in the first and the last."""
    low, high = RANGES[name]
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    numbers = np.clip((values - low) / (high - low) * BINS, 0, BINS - 1).astype(int)
    return counted(numbers)


def counted(numbers: Array) -> dict[str, int]:
    """How often each number occurs."""
    counts = np.bincount(numbers)
    return {str(number): int(counts[number]) for number in np.flatnonzero(counts)}


def position_bins(positions: Array) -> Array:
    """The bin of each position: 0, 2 (position 1), 3 (2), then two in each octave of position + 1."""
    numbers: Array = np.floor(2 * np.log2(positions + 1.0) + 1e-9).astype(int)
    return numbers


def length_bins(lengths: Array) -> Array:
    """The bin of each length of at least 1: `LENGTHS_PER_OCTAVE` in each octave."""
    numbers: Array = np.floor(LENGTHS_PER_OCTAVE * np.log2(np.maximum(lengths, 1)) + 1e-9)
    return numbers.astype(int)


def completion_values(done: pa.Table) -> dict[str, Array]:
    """The value of each metric for each completion; NaN where it has none."""
    flat = Flat(done)
    values = {
        name: done.column(name).to_numpy().astype(float) for name in ("completion_tokens", *SCALARS)
    }
    reasons = np.asarray(done.column("finish_reason").to_pylist(), str)
    values["stopped"] = (reasons == "stop").astype(float)
    values["repetition"] = repetition(flat)
    for side in ("base", "teacher"):
        values[f"{side}_log_weight"] = (
            values[f"sum_{side}_tempered_logprob"] - values["sum_logprob"]
        )
        values[f"mean_ess_{side}"] = mean_ess(done, flat, f"ess_{side}")
    return values


def repetition(flat: Flat) -> Array:
    """The share of a completion's runs of `GRAM` tokens that occurred in it before; NaN for shorter ones."""
    ids = flat.column("token_ids").astype(np.int64)
    runs = np.maximum(flat.lengths - GRAM + 1, 0)
    starts = np.flatnonzero(flat.lengths[flat.row] - flat.position >= GRAM)
    hashes = np.zeros(len(starts), np.uint64)
    for offset in range(GRAM):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + (ids[starts + offset] + 1).astype(
            np.uint64
        )
    rows = flat.row[starts]
    order = np.lexsort((hashes, rows))
    same = (np.diff(hashes[order]) == 0) & (np.diff(rows[order]) == 0)
    repeated = np.bincount(rows[order][1:][same], minlength=len(flat.lengths))
    return np.where(runs > 0, repeated / np.maximum(runs, 1), np.nan)


def sequence_weights(values: dict[str, Array]) -> Measures:
    """Per bin of lengths, logarithms of Σ w and Σ w² of the weights of whole sequences (docs/theory.md section 9)."""
    lengths, found = values["completion_tokens"], {}
    bins = length_bins(lengths)
    has_weight = np.isfinite(values["sum_logprob"]) & (lengths > 0)
    for number in np.unique(bins[has_weight]):
        inside = has_weight & (bins == number)
        found[str(number)] = {"count": int(inside.sum())} | {
            side: {
                "log_sum": _log_sum(values[f"{side}_log_weight"][inside]),
                "log_squares": _log_sum(2 * values[f"{side}_log_weight"][inside]),
            }
            for side in ("base", "teacher")
        }
    return found


def _log_sum(logarithms: Array) -> float:
    """log Σ exp; a very small number for no weight at all."""
    total = np.logaddexp.reduce(np.nan_to_num(logarithms, nan=-1e300, neginf=-1e300))
    return float(max(total, -1e300))


def mean_ess(done: pa.Table, flat: Flat, name: str) -> Array:
    """The mean over a completion's unforced tokens where it is finite; NaN without any."""
    if name not in done.column_names:
        return np.full(len(done), np.nan)
    values, free = flat.column(name).astype(np.float64), ~flat.column("forced")
    free &= np.isfinite(values)
    counts = np.bincount(flat.row[free], minlength=len(done))
    sums = np.bincount(flat.row[free], values[free], minlength=len(done))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def token_measures(done: pa.Table, flat: Flat) -> Measures:
    """Sums, histograms and counts over all tokens; empty without lists of diagnostics."""
    if "alpha" not in done.column_names:
        return {}

    free = ~flat.column("forced")
    columns = {name: flat.column(name).astype(np.float64) for name in (*FREE, *SEEN)}
    alpha, base, teacher = (columns[name] for name in ("alpha", "kl_base", "kl_teacher"))
    inside = free & (alpha > 0) & (alpha < 1) & np.isfinite(base) & np.isfinite(teacher)
    difference = log10(np.abs(base - teacher)[inside])
    cluster = flat.cluster[flat.row]
    bound = columns["tv_bound"]
    return {
        "tokens": len(free),
        "free": int(free.sum()),
        "at_base": int((free & (alpha == 0)).sum()),
        "at_teacher": int((free & (alpha == 1)).sum()),
        "no_common_token": int((~np.isfinite(base) | ~np.isfinite(teacher)).sum()),
        "tested": int(inside.sum()),
        "bound_above_0.01": int((bound > 0.01).sum()),
        "bound_above_0.05": int((bound > 0.05).sum()),
        "base_bounded": int(flat.column("base_bounded").sum()),
        "teacher_bounded": int(flat.column("teacher_bounded").sum()),
        "max_alpha_bound": float(columns["alpha_bound"].max(initial=0.0)),
        "max_tv_bound": float(bound.max(initial=0.0)),
        "sums": {name: cluster_sums(columns[name][free], cluster[free]) for name in FREE}
        | {name: cluster_sums(columns[name], cluster) for name in SEEN},
        "histograms": {
            "log10_difference": histogram(difference, "log10_difference"),
            "ess_base": histogram(columns["ess_base"][free], "ess_base"),
            "ess_teacher": histogram(columns["ess_teacher"][free], "ess_teacher"),
            "coverage": histogram(columns["coverage"], "coverage"),
            "log10_tv_bound": histogram(log10(bound), "log10_tv_bound"),
            "alpha_by_entropy": _alpha_by_entropy(alpha[free], columns["entropy"][free]),
        },
    }


def position_measures(done: pa.Table, flat: Flat) -> Measures:
    """Per bin of positions: tokens, sums by clusters, histograms of unforced tokens; empty without lists."""
    if "alpha" not in done.column_names:
        return {}

    free, bins = ~flat.column("forced"), position_bins(flat.position)
    columns = {name: flat.column(name).astype(np.float64) for name in (*FREE, *SEEN)}
    values = {
        "alpha": columns["alpha"],
        "log10_kl_base": log10(columns["kl_base"]),
        "log10_kl_teacher": log10(columns["kl_teacher"]),
        "entropy": columns["entropy"],
    }
    cluster, found = flat.cluster[flat.row], {}
    for number in np.unique(bins):
        inside = bins == number
        unforced = inside & free
        found[str(number)] = {
            "tokens": int(inside.sum()),
            "forced": int((inside & ~free).sum()),
            "sums": {
                name: cluster_sums(columns[name][unforced], cluster[unforced]) for name in FREE
            }
            | {name: cluster_sums(columns[name][inside], cluster[inside]) for name in SEEN},
            "histograms": {name: histogram(values[name][unforced], name) for name in BY_POSITION},
        }
    return found


def log10(values: Array) -> Array:
    """Logarithms to base 10 of values that may be 0."""
    logarithms: Array = np.log10(np.maximum(values, 1e-30))
    return logarithms


def _alpha_by_entropy(alpha: Array, entropy: Array) -> dict[str, int]:
    """Counts by the number of a cell: `ALPHA_STEPS` cells of α in each of `ENTROPY_STEPS` steps of entropy."""
    a = np.clip(alpha * ALPHA_STEPS, 0, ALPHA_STEPS - 1).astype(int)
    e = np.clip(entropy / ENTROPY_MOST * ENTROPY_STEPS, 0, ENTROPY_STEPS - 1).astype(int)
    return counted(e * ALPHA_STEPS + a)

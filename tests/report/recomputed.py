"""The numbers of a report made anew by pandas from the rows of RUN/data; knows columns, not our summaries.

`same` compares both: every number must be there and equal, quantiles of histograms to a bin.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import stats

Numbers = dict[str, Any]

LISTS = [
    "alpha",
    "kl_base",
    "kl_teacher",
    "entropy",
    "ess_base",
    "ess_teacher",
    "coverage",
    "alpha_bound",
    "tv_bound",
]
FLAGS = ["forced", "base_bounded", "teacher_bounded"]
QUANTILES = (5, 25, 50, 75, 95)
BINS = 200
RANGES = {  # of the histograms that quantiles come from
    "alpha": (0, 1), "log10_kl": (-8, 2), "difference": (-12, 3), "ess": (0, 1), "repetition": (0, 1), "bound": (-8, 0),
}  # fmt: skip


def frame_of(run: Path) -> pd.DataFrame:
    """All rows of a job."""
    return pd.concat([pq.read_table(path).to_pandas() for path in sorted((run / "data").glob("*"))])


def numbers_of(rows: pd.DataFrame, tolerance: float = 1e-6) -> Numbers:
    """All numbers of one run but for those of its manifest, its texts and its places."""
    done = rows[rows.error.isna()].copy()
    done["stopped"] = (done.finish_reason == "stop").astype(float)
    done["repetition"] = [repetition(ids) for ids in done.token_ids]
    for side in ("base", "teacher"):
        done[f"{side}_log_weight"] = done[f"sum_{side}_tempered_logprob"] - done.sum_logprob
    tokens = tokens_of(done)
    free = tokens[~tokens.forced]
    return {
        "alpha": alpha(tokens, free),
        "kl": kl(done, free, tolerance),
        "ess": ess(done, free),
        "lengths": lengths(rows, done),
        "exactness": exactness(done, tokens),
        "errors": errors(rows),
    }


def tokens_of(done: pd.DataFrame) -> pd.DataFrame:
    """One row per token."""
    tokens = done[["row_id", *LISTS, *FLAGS]].explode([*LISTS, *FLAGS])
    tokens["position"] = np.concatenate([np.arange(len(ids)) for ids in done.token_ids])
    return tokens.astype(dict.fromkeys(LISTS, float) | dict.fromkeys(FLAGS, bool))


def mean(frame: pd.DataFrame, column: str) -> Numbers:
    """The mean of the finite values, with a cluster-robust interval."""
    given = frame[np.isfinite(frame[column])]
    count, clusters = len(given), given.row_id.nunique()
    if not count:
        return {"mean": None, "low": None, "high": None, "count": 0, "clusters": 0}
    middle = given[column].mean()
    low = high = None
    if clusters > 1:
        residuals = (given[column] - middle).groupby(given.row_id).sum()
        error = math.sqrt((residuals**2).sum() * clusters / (clusters - 1)) / count
        margin = stats.t.ppf(0.975, clusters - 1) * error
        low, high = middle - margin, middle + margin
    return {"mean": middle, "low": low, "high": high, "count": count, "clusters": clusters}


def quantiles(values: pd.Series, *, power: bool = False) -> Numbers:
    """Quantiles as approximations: to a bin of α, or of a logarithm."""
    if power:
        values = values.clip(lower=0)
    found = (
        values.quantile([q / 100 for q in QUANTILES], interpolation="inverted_cdf")
        if len(values)
        else None
    )
    return {str(q): Near(found[q / 100], power) for q in QUANTILES}


class Near:
    """A quantile that a histogram gives to a bin."""

    def __init__(self, value: float, power: bool) -> None:
        self.value, self.power = value, power

    def holds(self, found: float) -> bool:
        if not self.power:
            return abs(found - self.value) <= 1.01 / BINS
        # 10 or 15 decades in BINS bins; all below the range is in the first bin.
        return abs(
            math.log10(found) - max(math.log10(max(self.value, 1e-30)), -12)
        ) <= 15.2 / BINS or (self.value < 1.2e-8 and found < 1.2e-8)


def shares(values: Any, low: float, high: float) -> list[Numbers]:
    """A histogram of 100 bins; what lies outside is in the first and the last."""
    edges = np.linspace(low, high, BINS // 2 + 1)
    inside = np.clip(np.asarray(values, float), low, np.nextafter(high, low))
    counts, _ = np.histogram(inside, edges)
    total = counts.sum()
    return [
        {"from": start, "to": end, "share": count / total if total else None}
        for start, end, count in zip(edges, edges[1:], counts, strict=False)
    ]


def logs(values: Any) -> np.ndarray:
    return np.log10(np.maximum(np.asarray(values, float), 1e-30))


def bin_edges(last: int) -> list[int]:
    """Two bins in each octave of position + 1."""
    edges = {math.ceil(2 ** (k / 2) - 1e-9) - 1 for k in range(2 * last.bit_length() + 4)}
    return sorted(edges)


def positions(tokens: pd.DataFrame) -> list[tuple[Numbers, pd.DataFrame]]:
    """(what a bin of positions is, its tokens)."""
    edges = bin_edges(int(tokens.position.max()))
    found = []
    for first, after in pairwise(edges):
        inside = tokens[(tokens.position >= first) & (tokens.position < after)]
        if len(inside):
            forced = int(inside.forced.sum())
            found.append(
                (
                    {"first": first, "last": after - 1, "tokens": len(inside), "forced": forced},
                    inside,
                )
            )
    return found


def by_position(tokens: pd.DataFrame, column: str, *, power: bool) -> list[Numbers]:
    found = []
    for place, inside in positions(tokens):
        free = inside[~inside.forced]
        if len(free):
            found.append(
                {**place, **mean(free, column), "quantiles": quantiles(free[column], power=power)}
            )
    return found


def alpha(tokens: pd.DataFrame, free: pd.DataFrame) -> Numbers:
    cells = free.assign(
        a=(free.alpha * 25).clip(0, 24).astype(int), e=(free.entropy * 4).clip(0, 23).astype(int)
    )
    counts = cells.groupby(["e", "a"]).size()
    return {
        "mean": mean(free, "alpha"),
        "quantiles": quantiles(free.alpha),
        "at_base": (free.alpha == 0).mean(),
        "at_teacher": (free.alpha == 1).mean(),
        "forced": tokens.forced.mean(),
        "histogram": shares(free.alpha, 0, 1),
        "by_position": by_position(tokens, "alpha", power=False),
        "by_entropy": [
            {"alpha": a / 25, "entropy": e / 4, "share": count / len(free)}
            for (e, a), count in counts.items()
        ],
    }


def kl(done: pd.DataFrame, free: pd.DataFrame, tolerance: float) -> Numbers:
    found: Numbers = {}
    for side in ("base", "teacher"):
        column = f"kl_{side}"
        found[side] = {
            "mean": mean(free, column),
            "quantiles": quantiles(free[column], power=True),
            "histogram": shares(logs(free[column]), -8, 2),
            "by_position": by_position(free, column, power=True),
        }
        for row, whole in zip(found[side]["by_position"], by_position_counts(done), strict=False):
            row |= whole
    inside = free[(free.alpha > 0) & (free.alpha < 1)]
    difference = (inside.kl_base - inside.kl_teacher).abs()
    return found | {
        "largest": {"mean": mean(done, "max_kl"), "histogram": shares(logs(done.max_kl), -8, 2)},
        "no_common_token": int((~np.isfinite(free.kl_base)).sum()),
        "self_test": {
            "applies": True,
            "tolerance": tolerance,
            "tested": len(inside),
            "above": (difference > tolerance).mean(),
            "quantiles": quantiles(difference, power=True),
            "histogram": shares(logs(difference), -12, 3),
        },
    }


def by_position_counts(done: pd.DataFrame) -> list[Numbers]:
    """Of bins with a free token, the tokens and forced ones."""
    return [place for place, inside in positions(tokens_of(done)) if (~inside.forced).any()]


def ess(done: pd.DataFrame, free: pd.DataFrame) -> Numbers:
    return {
        "per_token": {
            side: {
                "mean": mean(free, f"ess_{side}"),
                "histogram": shares(free[f"ess_{side}"], 0, 1),
            }
            for side in ("base", "teacher")
        },
        "sequences": kish(done),
        "by_length": [
            {"from": first, "to": after - 1, **kish(inside)}
            for first, after, inside in by_length(done)
        ],
        "log_weights": {side: mean(done, f"{side}_log_weight") for side in ("base", "teacher")},
    }


def kish(done: pd.DataFrame) -> Numbers:
    """Kish's effective sample size as a share, weights scaled by the largest."""
    found: Numbers = {"count": len(done)}
    for side in ("base", "teacher"):
        logarithms = done[f"{side}_log_weight"]
        weights = np.exp(logarithms - logarithms.max())
        found[side] = weights.sum() ** 2 / (weights**2).sum() / len(done)
    return found


def by_length(done: pd.DataFrame) -> list[tuple[int, int, pd.DataFrame]]:
    """(shortest, one after the longest, completions) of each quarter of an octave that has some."""
    edges = [
        math.ceil(2 ** (k / 4) - 1e-9)
        for k in range(4 * int(done.completion_tokens.max()).bit_length() + 2)
    ]
    found = []
    for first, after in pairwise(edges):
        inside = done[(done.completion_tokens >= first) & (done.completion_tokens < after)]
        if len(inside):
            found.append((first, after, inside))
    return found


def lengths(rows: pd.DataFrame, done: pd.DataFrame) -> Numbers:
    reasons = rows.finish_reason.value_counts()
    several = done.groupby("row_id").filter(lambda group: len(group) > 1)
    distinct = several.groupby("row_id").text.nunique().sum()
    repeated = len(several) - distinct
    return {
        "mean": mean(done, "completion_tokens"),
        "histogram": [
            {"from": first, "to": after - 1, "count": len(inside)}
            for first, after, inside in by_length(done)
        ],
        "finish_reasons": {
            reason: {"count": count, "share": count / len(rows)}
            for reason, count in reasons.items()
        },
        "stopped": mean(done, "stopped"),
        "repetition": mean(done, "repetition"),
        "repetition_histogram": shares(done.repetition.dropna(), 0, 1),
        "identical": {
            "rows": several.row_id.nunique(),
            "completions": len(several),
            "repeated": repeated,
            "share": repeated / len(several) if len(several) else None,
        },
    }


def repetition(ids: Any) -> float:
    """The share of runs of four that occurred before; NaN for fewer tokens."""
    runs = [tuple(ids[k : k + 4]) for k in range(len(ids) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else float("nan")


def exactness(done: pd.DataFrame, tokens: pd.DataFrame) -> Numbers:
    return {
        "is_exact": bool((tokens.tv_bound == 0).all()),
        "coverage": mean(tokens, "coverage"),
        "coverage_histogram": shares(tokens.coverage, 0, 1),
        "coverage_by_position": [
            {**place, **mean(inside, "coverage")} for place, inside in positions(tokens)
        ],
        "tv_bound": mean(tokens, "tv_bound"),
        "tv_bound_histogram": shares(logs(tokens.tv_bound), -8, 0),
        "above_0.01": (tokens.tv_bound > 0.01).mean(),
        "above_0.05": (tokens.tv_bound > 0.05).mean(),
        "largest_tv_bound": tokens.tv_bound.max(),
        "alpha_bound": mean(tokens, "alpha_bound"),
        "largest_alpha_bound": tokens.alpha_bound.max(),
        "whole_texts": mean(done, "sum_tv_bound"),
        "base_bounded": tokens.base_bounded.mean(),
        "teacher_bounded": tokens.teacher_bounded.mean(),
    }


def errors(rows: pd.DataFrame) -> Numbers:
    count = int(rows.error.notna().sum())
    return {"count": count, "share": count / len(rows)}


def same(found: Any, expected: Any, where: str = "") -> None:
    """Every number is there and equal to rounding; counts exactly."""
    if isinstance(expected, Near):
        assert expected.holds(found), f"{where}: {found} is not near {expected.value}"
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for k, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, f"{where}/{k}")
    elif isinstance(expected, bool | str) or expected is None:
        assert found == expected, where
    else:
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9), where

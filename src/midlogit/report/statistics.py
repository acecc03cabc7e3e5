"""Intervals, tests and weights over completions that come in clusters; knows sums and arrays, no columns and no files.

The completions of one row share its prompt, so they are no independent draws: standard errors go by clusters, with the
Student t of (clusters − 1) degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

LEVEL = 0.95
FEW_CLUSTERS = 200  # below it a difference is tested by flipping signs
EXACT_CLUSTERS = 12  # up to it over all 2^clusters signs
FLIPS = 9_999
MANY = 200  # degrees of freedom


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% interval.

    Attributes:
        low, high: None where fewer than two clusters give no interval.
        count, clusters: values and clusters that it is over.
    """

    mean: float | None
    low: float | None
    high: float | None
    count: int
    clusters: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_of(sums: Mapping[str, float]) -> Estimate:
    """The mean of what `midlogit.jobs.measures.cluster_sums` summed, with a cluster-robust interval."""
    count, clusters = int(sums["count"]), int(sums["clusters"])
    if not count:
        return Estimate(None, None, None, 0, 0)
    mean = sums["sum"] / count
    error = standard_error(sums)
    if error is None:
        return Estimate(mean, None, None, count, clusters)
    margin = t_quantile(clusters - 1) * error
    return Estimate(mean, mean - margin, mean + margin, count, clusters)


def standard_error(sums: Mapping[str, float]) -> float | None:
    """The cluster-robust standard error of a mean, √(G/(G−1) Σ (s_c − m n_c)²) / n; None for one cluster."""
    count, clusters = sums["count"], sums["clusters"]
    if clusters < 2:
        return None
    mean = sums["sum"] / count
    residuals = (
        sums["cluster_squares"]
        - 2 * mean * sums["cluster_products"]
        + mean * mean * sums["cluster_sizes"]
    )
    return math.sqrt(max(residuals, 0.0) * clusters / (clusters - 1)) / count


def deviation(sums: Mapping[str, float]) -> float:
    """The standard deviation of the values."""
    count = sums["count"]
    if count < 2:
        return 0.0
    return math.sqrt(max(sums["squares"] - sums["sum"] ** 2 / count, 0.0) / (count - 1))


def kish_share(log_sum: float, log_squares: float, count: int) -> float:
    """Kish's effective sample size (Σw)² / Σw² as a share of the number of weights; 0 where no weight is positive."""
    return math.exp(2 * log_sum - log_squares) / count if log_sum > -1e299 else 0.0


def paired_difference(differences: Array, cluster: Array, seed: int = 0) -> dict[str, Any]:
    """The mean of paired differences, its 95% interval by clusters, and a p-value.

    Args:
        differences: (n,) second minus first. cluster: (n,) numbers of clusters.
        seed: of the signs that are flipped.

    Returns:
        difference, low, high, p, test ("sign flips" below `FEW_CLUSTERS`, else "t"), count, clusters.
    """
    _, cluster = np.unique(cluster, return_inverse=True)
    sums, counts = np.bincount(cluster, differences), np.bincount(cluster).astype(float)
    count, clusters = len(differences), len(sums)
    mean = float(sums.sum() / count)
    found = {"difference": mean, "count": count, "clusters": clusters}
    if clusters < 2:
        return found | {"low": None, "high": None, "p": None, "test": None}

    error = (
        math.sqrt(float(np.square(sums - mean * counts).sum()) * clusters / (clusters - 1)) / count
    )
    margin = t_quantile(clusters - 1) * error
    found |= {"low": mean - margin, "high": mean + margin}
    if clusters < FEW_CLUSTERS:
        return found | {"p": sign_flips(sums, seed), "test": "sign flips"}
    p = two_sided_p(mean / error, clusters - 1) if error else float(mean == 0)
    return found | {"p": p, "test": "t"}


def welch_difference(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, Any]:
    """The difference of the means of two runs that share no completion, by Welch with clusters as the units."""
    one, two = mean_of(first), mean_of(second)
    clusters = min(one.clusters, two.clusters)
    found = {"count": min(one.count, two.count), "clusters": clusters}
    if one.mean is None or two.mean is None:
        return found | dict.fromkeys(("difference", "low", "high", "p", "test"))
    difference = two.mean - one.mean
    errors = standard_error(first), standard_error(second)
    if errors[0] is None or errors[1] is None:
        return found | {
            "difference": difference,
            "low": None,
            "high": None,
            "p": None,
            "test": None,
        }

    parts = errors[0] ** 2, errors[1] ** 2
    error = math.sqrt(sum(parts))
    below = parts[0] ** 2 / (one.clusters - 1) + parts[1] ** 2 / (two.clusters - 1)
    freedom = max(int(sum(parts) ** 2 / below), 1) if below else clusters - 1
    margin = t_quantile(freedom) * error
    p = two_sided_p(difference / error, freedom) if error else float(difference == 0)
    interval = {"low": difference - margin, "high": difference + margin}
    return found | {"difference": difference, "p": p, "test": "Welch"} | interval


def ratio_difference(
    first: tuple[Array, Array], second: tuple[Array, Array]
) -> tuple[float, float | None]:
    """The difference of two ratios of sums over the same clusters, and its standard error by clusters.

    Args:
        first, second: sums of values and of counts per cluster, (clusters,) each.
    """
    (x1, n1), (x2, n2) = first, second
    one, two = x1.sum() / n1.sum(), x2.sum() / n2.sum()
    influence = (x2 - two * n2) / n2.sum() - (x1 - one * n1) / n1.sum()
    clusters = int(((n1 > 0) | (n2 > 0)).sum())
    if clusters < 2:
        return float(two - one), None
    return float(two - one), math.sqrt(
        clusters / (clusters - 1) * float(np.square(influence).sum())
    )


def sign_flips(sums: Array, seed: int = 0) -> float:
    """The p-value of a sum of clusters' differences, if each could as well have the other sign."""
    observed = abs(float(sums.sum())) * (1 - 1e-12)
    if len(sums) <= EXACT_CLUSTERS:
        numbers = np.arange(2 ** len(sums))
        signs = 1.0 - 2 * (numbers[:, None] >> np.arange(len(sums)) & 1)
        return float((np.abs(signs @ sums) >= observed).mean())
    generator = np.random.default_rng(seed)
    signs = 1.0 - 2 * generator.integers(0, 2, (FLIPS, len(sums)))
    return float(1 + (np.abs(signs @ sums) >= observed).sum()) / (1 + FLIPS)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted by Holm for their number; those that are missing count for nothing."""
    given = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, i) in enumerate(given):
        least = max(least, min((len(given) - rank) * p, 1.0))
        adjusted[i] = least
    return adjusted


def two_sided_p(t: float, freedom: int) -> float:
    """P(|T| ≥ |t|) of Student's t; above `MANY` degrees by Wallace's normal approximation, which errs by 1e-6."""
    if freedom <= MANY:
        return 1 - _within(abs(t), freedom)
    z = math.sqrt(freedom * math.log1p(t * t / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return math.erfc(z / math.sqrt(2))


def t_quantile(freedom: int) -> float:
    """The t within which Student's distribution has the probability `LEVEL` on both sides.

    By bisection; above `MANY` degrees by the expansion of Cornish and Fisher, which errs by less than 1e-8 there.
    """
    if freedom > MANY:
        z, v = NormalDist().inv_cdf(0.5 + LEVEL / 2), freedom
        second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        return (
            z
            + (z**3 + z) / (4 * v)
            + second
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        )

    low, high = 0.0, 1.0
    while _within(high, freedom) < LEVEL:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if _within(middle, freedom) < LEVEL:
            low = middle
        else:
            high = middle
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| ≤ t) for a whole number of degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom == 1:
        return 2 * angle / math.pi
    term = total = cosine if freedom % 2 else 1.0
    for k in range(2 + freedom % 2, freedom - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total

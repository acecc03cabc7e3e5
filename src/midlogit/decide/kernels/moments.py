"""Sums over a row pair from which α is found; knows logits and the mixture, not settings or rules.

ℓ (docs/theory.md (3)) is kept in units of log 2. Differences come before scaling: log t − log p is made from t − b,
which is exact for rows that nearly agree, so nothing small is the difference of two large numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from midlogit.decide.kernels.tiles import LN2, NOTHING, pair_tile, total

SERIES = tl.constexpr(0.25)  # where the series for e^x − 1 takes over


@triton.jit
def log_ratio(b, t, at, scale, c, HOLES: tl.constexpr):
    """ℓ (or ℓ + c where c is 0) in units of log 2, 0 off the common support; and the common support."""
    ratio = (((t - at[1]) - (b - at[0])) - at[2]) * scale - c
    common = b == b
    if HOLES:
        common = (b > float("-inf")) & (t > float("-inf"))
        ratio = tl.where(common, ratio, 0.0)
    return ratio, common


@triton.jit
def anchors(b_peak, t_peak):
    """Offsets to subtract from b, t and their difference, so that ℓ + c loses no digits.

    Rows at about the same height are subtracted first (exact where they nearly agree), rows far apart each from
    its own peak.
    """
    level = tl.abs(t_peak - b_peak) < 1.0
    return (
        tl.where(level, 0.0, b_peak),
        tl.where(level, 0.0, t_peak),
        tl.where(level, t_peak - b_peak, 0.0),
    )


@triton.jit
def expm1_over(x):
    """(e^x − 1) / x for |x| < SERIES."""
    return 1.0 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))


@triton.jit
def curvature(x):
    """(e^x − 1 − x) / x² for |x| < SERIES."""
    return 0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))


class Landmarks(NamedTuple):
    """Sums over a row pair at α = 0 (the base p), ½ (the middle w) and 1 (the teacher t), relative to both peaks.

    Attributes:
        p0, p1, p2: Σ p and the unnormalised first two moments of ℓ + c, on the common support; w0 to t2 likewise.
        p_off, t_off: masses off the common support.
        gap: Σ (t − p), whose terms cancel where the rows agree.
        size: Σ w |ℓ + c|.
    """

    p0: Any
    p1: Any
    p2: Any
    w0: Any
    w1: Any
    w2: Any
    t0: Any
    t1: Any
    t2: Any
    p_off: Any
    t_off: Any
    gap: Any
    size: Any


@triton.jit
def landmarks(
    row,
    b_peak,
    t_peak,
    scale,
    R: tl.constexpr,
    FULL: tl.constexpr,
    NUCLEUS: tl.constexpr,
    HOLES: tl.constexpr,
):
    """The Landmarks of a row pair."""
    p0 = tl.zeros((R,), tl.float32)
    p1 = p0
    p2 = p0
    w0 = p0
    w1 = p0
    w2 = p0
    t0 = p0
    t1 = p0
    t2 = p0
    p_off = p0
    t_off = p0
    gap = p0
    size = p0
    at = anchors(b_peak, t_peak)
    half = 0.5 * scale
    for start in range(0, row.length, R * 8):
        b, t, _ = pair_tile(row, start, R, FULL, NUCLEUS, HOLES)
        ratio, common = log_ratio(b, t, at, scale, 0.0, HOLES)
        p = tl.exp2((b - b_peak) * half)
        q = tl.exp2((t - t_peak) * half)
        w = p * q
        p = p * p
        q = q * q
        pc = p
        qc = q
        if HOLES:
            pc = tl.where(common, p, 0.0)
            qc = tl.where(common, q, 0.0)
            p_off += tl.sum(p - pc, axis=1)
            t_off += tl.sum(q - qc, axis=1)
        y = ratio * LN2
        gap += tl.sum(tl.where(tl.abs(y) < SERIES, pc * y * expm1_over(y), qc - pc), axis=1)
        p0 += tl.sum(pc, axis=1)
        w0 += tl.sum(w, axis=1)
        t0 += tl.sum(qc, axis=1)
        pc = pc * ratio
        w = w * ratio
        qc = qc * ratio
        p1 += tl.sum(pc, axis=1)
        w1 += tl.sum(w, axis=1)
        size += tl.sum(tl.abs(w), axis=1)
        t1 += tl.sum(qc, axis=1)
        p2 += tl.sum(pc * ratio, axis=1)
        w2 += tl.sum(w * ratio, axis=1)
        t2 += tl.sum(qc * ratio, axis=1)
    return Landmarks(
        total(p0), total(p1), total(p2), total(w0), total(w1), total(w2), total(t0), total(t1),
        total(t2), total(p_off), total(t_off), total(gap), total(size),
    )  # fmt: skip


@triton.jit
def moments(
    row,
    b_peak,
    t_peak,
    scale,
    c,
    alpha,
    R: tl.constexpr,
    FULL: tl.constexpr,
    NUCLEUS: tl.constexpr,
    HOLES: tl.constexpr,
):
    """log2 Σ p^(1-α) t^α over the common support, with p relative to its peak and t/p normalised, and E[ℓ^k].

    Weights are relative to the largest met so far, so that no α and no pair of rows underflows as a whole;
    NOTHING comes back where there is no common support.
    """
    peak = tl.full((R,), NOTHING, tl.float32)
    s0 = tl.zeros((R,), tl.float32)
    s1 = s0
    s2 = s0
    s3 = s0
    at = anchors(b_peak, t_peak)
    for start in range(0, row.length, R * 8):
        b, t, _ = pair_tile(row, start, R, FULL, NUCLEUS, HOLES)
        ratio, common = log_ratio(b, t, at, scale, c, HOLES)
        weight = (b - b_peak) * scale + alpha * ratio
        if HOLES:
            weight = tl.where(common, weight, float("-inf"))
        new = tl.maximum(peak, tl.max(weight, axis=1))
        keep = tl.exp2(peak - new)
        mass = tl.exp2(weight - new[:, None])
        s0 = s0 * keep + tl.sum(mass, axis=1)
        mass = mass * ratio
        s1 = s1 * keep + tl.sum(mass, axis=1)
        mass = mass * ratio
        s2 = s2 * keep + tl.sum(mass, axis=1)
        s3 = s3 * keep + tl.sum(mass * ratio, axis=1)
        peak = new
    top = tl.max(peak)
    keep = tl.exp2(peak - top)
    m0 = total(s0 * keep)
    safe = tl.where(m0 > 0, m0, 1.0)
    size = tl.where(m0 > 0, tl.log(safe) / LN2 + top.to(tl.float64), NOTHING)
    return size, total(s1 * keep) / safe, total(s2 * keep) / safe, total(s3 * keep) / safe


@triton.jit
def close_moments(
    row, b_peak, t_peak, scale, alpha, R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr
):
    """Sums for rows that nearly agree, whose terms all have the size of the result.

    With y = ℓ + c they are Σ p, Σ p y, Σ p (e^y − 1 − y), Σ p (e^αy − 1 − αy), Σ p y (e^αy − 1), Σ p y² e^αy.
    """
    n0 = tl.zeros((R,), tl.float32)
    n1 = n0
    h1 = n0
    ha = n0
    a1 = n0
    a2 = n0
    at = anchors(b_peak, t_peak)
    natural = scale * LN2
    for start in range(0, row.length, R * 8):
        b, t, _ = pair_tile(row, start, R, FULL, NUCLEUS, False)
        y, _ = log_ratio(b, t, at, natural, 0.0, False)
        p_log = (b - b_peak) * scale
        t_log = (t - t_peak) * scale
        p = tl.exp2(p_log)
        x = alpha * y
        w = tl.exp2(p_log + x * (1 / LN2))
        close = tl.abs(y) < SERIES
        step = tl.where(close, p * x * expm1_over(x), w - p)
        n0 += tl.sum(p, axis=1)
        n1 += tl.sum(p * y, axis=1)
        h1 += tl.sum(tl.where(close, p * y * y * curvature(y), tl.exp2(t_log) - p - p * y), axis=1)
        ha += tl.sum(tl.where(close, p * x * x * curvature(x), w - p - p * x), axis=1)
        a1 += tl.sum(step * y, axis=1)
        a2 += tl.sum(w * y * y, axis=1)
    return total(n0), total(n1), total(h1), total(ha), total(a1), total(a2)

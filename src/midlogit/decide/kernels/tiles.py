"""How a Triton program reads rows of logits, tile by tile; knows hidden ids and stop classes, no mixture.

A sweep reads a row once, in tiles of R × 8 ids, keeps one partial sum for each of the R lanes and adds the lanes in
float64 at the end. Everything per id is float32. Exponents are powers of two: `scale` is log2(e) / temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1.0e30)  # below every exponent, and finite
LOWEST = tl.constexpr(-3.4028234663852886e38)  # below every logit, and finite
FAR = tl.constexpr(2147483647)  # beyond every column

BASE = tl.constexpr(0)  # a side, as side_tile counts them
TEACHER = tl.constexpr(1)


@triton.jit
def total(lanes):
    tl.debug_barrier()  # compute-sanitizer sees a sum write where the one before it is still read
    return tl.sum(lanes.to(tl.float64))


@triton.jit
def log_total(peaks, sums):
    """log Σ of lanes with a peak each, natural; NaN where a sum is."""
    peak = tl.max(peaks)
    return tl.log(total(sums * tl.exp2((peaks - peak) * LOG2E))) + peak.to(tl.float64)


@triton.jit
def columns(start, R: tl.constexpr):
    return start + tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def hidden_tile(hidden, start, R: tl.constexpr):
    """Which ids of a tile are hidden; one byte of the mask holds the eight ids of a lane."""
    bytes_R = tl.load(hidden + start // 8 + tl.arange(0, R)).to(tl.int32)
    return ((bytes_R[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def side_tile(row, start, R: tl.constexpr, SIDE: tl.constexpr, FULL: tl.constexpr):
    """One model's effective logits: −inf where hidden, the stop class in its column.

    `row` is (base, teacher, length, hidden, dirty, stop column, stop base, stop teacher, tau, tie); FULL says
    that hidden ids and the stop class are still to be dealt with.
    """
    cols = columns(start, R)
    x = tl.load(row[SIDE] + cols, mask=cols < row[2], other=float("-inf")).to(tl.float32)
    if FULL:
        if tl.load(row[4] + start // (R * 8)) != 0:
            x = tl.where(hidden_tile(row[3], start, R), float("-inf"), x)
            x = tl.where(cols == row[5], row[6 + SIDE], x)
    return x, cols


@triton.jit
def pair_tile(row, start, R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr, HOLES: tl.constexpr):
    """Both effective rows; with NUCLEUS nothing outside the support: t > tau, or t = tau and the id at most tie.

    Nothing is −inf with HOLES, which says that the rows may hold −inf themselves, and otherwise a finite logit
    of no mass, which needs no care in differences.
    """
    NONE: tl.constexpr = float("-inf") if HOLES else -1.0e30
    cols = columns(start, R)
    inside = cols < row[2]
    b = tl.load(row[0] + cols, mask=inside, other=NONE).to(tl.float32)
    t = tl.load(row[1] + cols, mask=inside, other=NONE).to(tl.float32)
    if FULL:
        if tl.load(row[4] + start // (R * 8)) != 0:
            hide = hidden_tile(row[3], start, R)
            stop = cols == row[5]
            b = tl.where(stop, row[6], tl.where(hide, NONE, b))
            t = tl.where(stop, row[7], tl.where(hide, NONE, t))
    if NUCLEUS:
        kept = (t > row[8]) | ((t == row[8]) & (cols <= row[9]))
        b = tl.where(kept, b, NONE)
        t = tl.where(kept, t, NONE)
    return b, t, cols


@triton.jit
def stop_sums(ptr, ids, width, inv_t):
    """log Σ exp over the stop class, raw, and as the logit that tempers to the class's tempered mass; its logits.

    Members beyond `width`, the ids that the model has, are −inf.
    """
    x = tl.load(ptr + ids, mask=(ids >= 0) & (ids < width), other=float("-inf")).to(tl.float64)
    peak = tl.max(x)
    safe = tl.where(peak > float("-inf"), peak, 0.0)
    raw = tl.log(tl.maximum(tl.sum(tl.exp(x - safe)), 1e-300)) + safe
    mass = tl.log(tl.maximum(tl.sum(tl.exp((x - safe) * inv_t)), 1e-300)) / inv_t + safe
    some = peak > float("-inf")
    return tl.where(some, raw, float("-inf")), tl.where(some, mass, float("-inf")), x


@triton.jit
def group_at(mass_G, uniform, GROUPS: tl.constexpr):
    """The group of columns in which an inverse CDF falls, and the mass that it is to pass there."""
    groups_G = tl.arange(0, GROUPS)
    goal = uniform * tl.sum(mass_G)
    last = tl.max(tl.where(mass_G > 0, groups_G, 0))
    group = tl.minimum(tl.min(tl.where(tl.cumsum(mass_G, axis=0) > goal, groups_G, GROUPS - 1)), last)
    return group, goal - tl.sum(tl.where(groups_G < group, mass_G, 0.0))


@triton.jit
def column_at(mass, lane, cols, goal):
    """The first column of a tile at which the mass passes the goal, FAR if none; and the last that has any."""
    until = (tl.cumsum(lane, axis=0) - lane)[:, None] + tl.cumsum(mass, axis=1)
    return tl.min(tl.where((until > goal) & (mass > 0), cols, FAR)), tl.max(tl.where(mass > 0, cols, 0))

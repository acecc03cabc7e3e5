"""Reads rows of logits tile by tile, as a Triton program does; knows hidden ids and stop classes, no mixture.

A sweep reads a row once, in tiles of R × 8 ids, keeps one partial sum for each of the R lanes and adds the lanes in
float64 at the end. Everything per id is float32. Exponents are powers of two: `scale` is log2(e) / temperature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from midlogit.decide.kernels.noise import arrivals

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1.0e30)  # below every exponent, and finite
LOWEST = tl.constexpr(-3.4028234663852886e38)  # below every logit, and finite
FAR = tl.constexpr(2147483647)  # beyond every column

BASE = tl.constexpr(0)  # a side, as side_tile counts them
TEACHER = tl.constexpr(1)


class RowPair(NamedTuple):
    """The rows of both models that a program reads.

    Effective logits have −inf at hidden ids, and the merged stop class in the column of its first id.

    Attributes:
        base, teacher: pointers to the logits.
        length: the number of columns that outcomes come from.
        hidden: pointer to the bits of hidden ids.
        hidden_tiles: pointer to one flag per tile: whether it has a hidden id or the stop class.
        stop_at: column of the stop class, −1 without.
        stop_base, stop_teacher: its effective logits.
        tau, tie: the nucleus has the ids with t > tau, and those with t = tau up to the id tie. Unused without a
            support constraint.
    """

    base: Any
    teacher: Any
    length: Any
    hidden: Any
    hidden_tiles: Any
    stop_at: Any
    stop_base: Any
    stop_teacher: Any
    tau: Any
    tie: Any


@triton.jit
def total(lanes):
    tl.debug_barrier()  # compute-sanitizer sees a sum write where the one before it is still read
    return tl.sum(lanes.to(tl.float64))


@triton.jit
def log_total(peaks, sums):
    """log Σ of lanes with a peak each, natural; NaN where a sum is."""
    return tempered_total(peaks, sums, LOG2E, 1.0)


@triton.jit
def tempered_total(peaks, sums, scale, inv_temperature):
    """`log_total` of sums of tempered masses; the peaks are of logits."""
    peak = tl.max(peaks)
    spread = tl.exp2((peaks - peak) * scale)
    return tl.log(total(sums * spread)) + peak.to(tl.float64) * inv_temperature


@triton.jit
def log_add(x, y):
    """log (e^x + e^y), natural; −inf where both are."""
    most = tl.maximum(x, y)
    safe = tl.where(most > float("-inf"), most, 0.0)
    return safe + tl.log(tl.exp(x - safe) + tl.exp(y - safe))


@triton.jit
def columns(start, R: tl.constexpr):
    return start + tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def hidden_ids(hidden, start, R: tl.constexpr):
    """Whether each id of a tile is hidden; one byte of the mask has the eight ids of a lane."""
    bytes_R = tl.load(hidden + start // 8 + tl.arange(0, R)).to(tl.int32)
    return ((bytes_R[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def side_tile(row, start, R: tl.constexpr, SIDE: tl.constexpr, FULL: tl.constexpr):
    """One model's effective logits of a tile, and their columns.

    Args:
        row: a RowPair.
        FULL: whether hidden ids and the stop class are still to be dealt with.
    """
    cols = columns(start, R)
    logits = row.base if SIDE == BASE else row.teacher
    stop = row.stop_base if SIDE == BASE else row.stop_teacher
    x = tl.load(logits + cols, mask=cols < row.length, other=float("-inf")).to(tl.float32)
    if FULL:
        if tl.load(row.hidden_tiles + start // (R * 8)) != 0:
            x = tl.where(hidden_ids(row.hidden, start, R), float("-inf"), x)
            x = tl.where(cols == row.stop_at, stop, x)
    return x, cols


@triton.jit
def pair_tile(
    row, start, R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr, HOLES: tl.constexpr
):
    """Both models' effective logits of a tile, and their columns.

    Args:
        row: a RowPair.
        FULL: whether hidden ids and the stop class are still to be dealt with.
        NUCLEUS: whether ids outside the support count as hidden.
        HOLES: whether the rows may hold −inf. If not, hidden ids get a finite logit of no mass, which needs no care in
            differences.
    """
    NONE: tl.constexpr = float("-inf") if HOLES else -1.0e30
    cols = columns(start, R)
    inside = cols < row.length
    b = tl.load(row.base + cols, mask=inside, other=NONE).to(tl.float32)
    t = tl.load(row.teacher + cols, mask=inside, other=NONE).to(tl.float32)
    if FULL:
        if tl.load(row.hidden_tiles + start // (R * 8)) != 0:
            hide = hidden_ids(row.hidden, start, R)
            stop = cols == row.stop_at
            b = tl.where(stop, row.stop_base, tl.where(hide, NONE, b))
            t = tl.where(stop, row.stop_teacher, tl.where(hide, NONE, t))
    if NUCLEUS:
        kept = (t > row.tau) | ((t == row.tau) & (cols <= row.tie))
        b = tl.where(kept, b, NONE)
        t = tl.where(kept, t, NONE)
    return b, t, cols


@triton.jit
def stop_sums(logits, ids, width, inv_temperature):
    """Sums over the stop class of one model.

    Args:
        width: how many ids the model has; members beyond it count as −inf.

    Returns:
        Its raw log-sum-exp; its effective logit, which tempers to the tempered mass of the class; its members' logits.
    """
    x = tl.load(logits + ids, mask=(ids >= 0) & (ids < width), other=float("-inf")).to(tl.float64)
    peak = tl.max(x)
    safe = tl.where(peak > float("-inf"), peak, 0.0)
    raw = tl.log(tl.maximum(tl.sum(tl.exp(x - safe)), 1e-300)) + safe
    mass = (
        tl.log(tl.maximum(tl.sum(tl.exp((x - safe) * inv_temperature)), 1e-300)) / inv_temperature
        + safe
    )
    some = peak > float("-inf")
    return tl.where(some, raw, float("-inf")), tl.where(some, mass, float("-inf")), x


@triton.jit
def stop_place(x, ids, uniform, greedy, inv_temperature, STOPS: tl.constexpr):
    """The member of a stop class that its own tempered masses draw (docs/theory.md (20b)); 0 where none has any.

    Args:
        x, ids: the members' logits, float64, and their ids.
    """
    peak = tl.max(x)
    mass = tl.exp((x - tl.where(peak > float("-inf"), peak, 0.0)) * inv_temperature)
    likeliest = tl.where((x == peak) & (mass > 0), 0.0, float("inf"))
    arrival = tl.where(greedy, likeliest, arrivals(mass, ids, uniform))
    return first_place(arrival, tl.arange(0, STOPS))


@triton.jit
def first_place(arrival, places):
    """The place of the first arrival, the lowest of several."""
    return tl.min(tl.where(arrival == tl.min(arrival), places, FAR))

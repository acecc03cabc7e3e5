"""Sums to report of q, and the token drawn from it; knows α and the masses of both models, not how they were found.

A token is drawn as docs/speculation.md says: the base's draft is accepted, or one drawn from (q − D)₊ replaces it. The
KLs are sums of terms that are never negative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from midlogit.decide.kernels.moments import SERIES, anchors, curvature, log_ratio
from midlogit.decide.kernels.noise import FIRST_BLOCK, arrivals
from midlogit.decide.kernels.tiles import FAR, LN2, columns, first_place, pair_tile, total


class Mixture(NamedTuple):
    """A row pair's q, by what turns effective logits into log2 q; float32.

    Attributes:
        b_peak, t_peak: what both models' weights are relative to.
        scale: log2(e) / temperature.
        c: ℓ's normaliser, in units of log 2.
        alpha: α. to_teacher: whether q is the teacher instead.
        p_size, t_size, q_size: log2 of the masses that turn weights into probabilities. An error in q_size is made good
            by dividing by Σ q.
        excess: q_size − p_size, which is F in units of log 2, as a difference of float64.
    """

    b_peak: Any
    t_peak: Any
    scale: Any
    c: Any
    alpha: Any
    to_teacher: Any
    p_size: Any
    t_size: Any
    q_size: Any
    excess: Any


class Report(NamedTuple):
    """Sums over a row pair.

    Attributes:
        mass_B: per group of tiles Σ q, or the largest log2 q of a greedy row.
        rest_B: per group Σ (q − D)₊.
        z: Σ q.
        kl_base: Σ q (p/q − 1 − log(p/q)) in nats, or Σ q log(q/p), the same but for rounding.
        kl_teacher: the same for t.
        entropy: Σ q log2 q.
        ess_base, ess_teacher: Σ p²/q and Σ t²/q.
        base_off, teacher_off: masses of p and t where q is 0.
        missing: mass of q where p is 0.
    """

    mass_B: Any
    rest_B: Any
    z: Any
    kl_base: Any
    kl_teacher: Any
    entropy: Any
    ess_base: Any
    ess_teacher: Any
    base_off: Any
    teacher_off: Any
    missing: Any


@triton.jit
def mixture_of(b_peak, t_peak, scale, mass, alpha, p_size, q_size, to_teacher):
    """The Mixture at α, from Masses and log2 of the masses of base and q."""
    return Mixture(
        b_peak=b_peak,
        t_peak=t_peak,
        scale=scale,
        c=(mass.c / LN2).to(tl.float32),
        alpha=alpha.to(tl.float32),
        to_teacher=to_teacher,
        p_size=p_size.to(tl.float32),
        t_size=(tl.log(mass.t) / LN2).to(tl.float32),
        q_size=q_size.to(tl.float32),
        excess=(q_size - p_size).to(tl.float32),  # the difference comes before rounding
    )


@triton.jit
def weigh(b, t, mix, HOLES: tl.constexpr):
    """Weights of effective logits.

    Returns:
        log2 of q and of the teacher, ℓ in units of log 2, log2 of the base relative to its peak; whether q has mass
        here, and whether both models have.
    """
    ratio, common = log_ratio(b, t, anchors(mix.b_peak, mix.t_peak), mix.scale, mix.c, HOLES)
    p_rel = (b - mix.b_peak) * mix.scale
    t_log = (t - mix.t_peak) * mix.scale - mix.t_size
    q_log = p_rel + mix.alpha * ratio - mix.q_size
    drawn = common
    if HOLES:
        drawn = tl.where(mix.to_teacher, t > float("-inf"), common)
        q_log = tl.where(drawn, tl.where(mix.to_teacher, t_log, q_log), float("-inf"))
    return q_log, t_log, ratio, p_rel, drawn, common


@triton.jit
def report_sweep(
    row,
    mix,
    share,
    greedy,
    R: tl.constexpr,
    FULL: tl.constexpr,
    NUCLEUS: tl.constexpr,
    HOLES: tl.constexpr,
    CLOSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The Report of a row pair.

    Args:
        mix: a Mixture.
        share: D's mass on the support, so that D is p times that.
        HOLES: whether the rows may hold −inf, or q is the teacher.
        CLOSE: whether the KLs may be small, and are summed from terms that are never negative.
    """
    mass_B = tl.zeros((BLOCKS,), tl.float32)
    rest_B = mass_B
    kl_b = tl.zeros((R,), tl.float32)
    kl_t = kl_b
    entropy = kl_b
    ess_b = kl_b
    ess_t = kl_b
    b_off = kl_b
    t_off = kl_b
    missing = kl_b
    z = tl.zeros((), tl.float64)
    for block in range(0, row.length, BLOCK):
        q_lane = tl.zeros((R,), tl.float32)
        rest = q_lane
        best = tl.full((R,), float("-inf"), tl.float32)
        for start in range(block, tl.minimum(block + BLOCK, row.length), R * 8):
            b, t, _ = pair_tile(row, start, R, FULL, NUCLEUS, HOLES)
            q_log, t_log, ratio, p_rel, drawn, common = weigh(b, t, mix, HOLES)
            q = tl.exp2(q_log)
            p = tl.exp2(p_rel - mix.p_size)
            m = tl.exp2(t_log)
            inverse = tl.exp2(tl.minimum(-q_log, 126.0))
            x = (mix.excess - mix.alpha * ratio) * LN2
            y = (mix.excess + (1.0 - mix.alpha) * ratio) * LN2
            if HOLES:
                x = tl.where(common, x, 0.0)
                y = tl.where(common, y, 0.0)
                p_in = tl.where(drawn, p, 0.0)
                m_in = tl.where(drawn, m, 0.0)
                b_off += tl.sum(p - p_in, axis=1)
                t_off += tl.sum(m - m_in, axis=1)
                missing += tl.sum(tl.where(common, 0.0, q), axis=1)
                entropy += tl.sum(tl.where(drawn, q * q_log, 0.0), axis=1)
                p = p_in
                m = m_in
            else:
                entropy += tl.sum(q * q_log, axis=1)
            if CLOSE:
                kl_b += tl.sum(
                    tl.where(tl.abs(x) < SERIES, q * x * x * curvature(x), p - q - q * x), axis=1
                )
                kl_t += tl.sum(
                    tl.where(tl.abs(y) < SERIES, q * y * y * curvature(y), m - q - q * y), axis=1
                )
            else:
                kl_b -= tl.sum(q * x, axis=1)
                kl_t -= tl.sum(q * y, axis=1)
            ess_b += tl.sum(p * (p * inverse), axis=1)
            ess_t += tl.sum(m * (m * inverse), axis=1)
            q_lane += tl.sum(q, axis=1)
            rest += tl.sum(tl.maximum(q - share * p, 0.0), axis=1)
            if greedy:
                best = tl.maximum(best, tl.max(q_log, axis=1))
        value = tl.sum(q_lane)
        z += value.to(tl.float64)
        if greedy:
            value = tl.max(best)
        mine = tl.arange(0, BLOCKS) == block // BLOCK
        mass_B = tl.where(mine, value, mass_B)
        rest_B = tl.where(mine, tl.sum(rest), rest_B)
    return Report(
        mass_B=mass_B,
        rest_B=rest_B,
        z=z,
        kl_base=total(kl_b),
        kl_teacher=total(kl_t),
        entropy=total(entropy),
        ess_base=total(ess_b),
        ess_teacher=total(ess_t),
        base_off=total(b_off),
        teacher_off=total(t_off),
        missing=total(missing),
    )


@triton.jit
def make_report(
    row,
    mix,
    share,
    greedy,
    # Whether the pair may hold −inf, or q is the teacher; whether the KLs may be small.
    general,
    close,
    R: tl.constexpr,
    FULL: tl.constexpr,
    NUCLEUS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The Report, by the cheapest sweep that is exact enough."""
    if general:
        report = report_sweep(row, mix, share, greedy, R, FULL, NUCLEUS, True, True, BLOCK, BLOCKS)
    elif close:
        report = report_sweep(row, mix, share, greedy, R, FULL, NUCLEUS, False, True, BLOCK, BLOCKS)
    else:
        report = report_sweep(
            row, mix, share, greedy, R, FULL, NUCLEUS, False, False, BLOCK, BLOCKS
        )
    return report


@triton.jit
def find_draft(row, ids, drafted, R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr):
    """The column of the drafted outcome and both effective logits there; −inf off the support."""
    column = drafted
    if not FULL:
        column = tl.full((), FAR, tl.int32)
        for start in range(0, row.length, R * 8):
            cols = columns(start, R)
            found = tl.load(ids + cols, mask=cols < row.length, other=-1)
            column = tl.minimum(column, tl.min(tl.where(found == drafted, cols, FAR)))
    kept = column < row.length
    column = tl.where(kept, column, 0)
    stop = column == row.stop_at
    b = tl.where(stop, row.stop_base, tl.load(row.base + column).to(tl.float32))
    t = tl.where(stop, row.stop_teacher, tl.load(row.teacher + column).to(tl.float32))
    if NUCLEUS:
        kept = kept & ((t > row.tau) | ((t == row.tau) & (column <= row.tie)))
    return column, tl.where(kept, b, float("-inf")), tl.where(kept, t, float("-inf"))


@triton.jit
def describe_given(row, given, stop_id, mix, R: tl.constexpr, NUCLEUS: tl.constexpr):
    """The column of a given id in whole rows, its outcome's log2 q, and whether the support has that.

    Args:
        stop_id: the id if it is of the stop class, else another.
        mix: a Mixture.
    """
    outcome = tl.where((row.stop_at >= 0) & (given == stop_id), row.stop_at, given)
    column, b, t = find_draft(row, row.base, outcome, R, True, NUCLEUS)
    hidden = (tl.load(row.hidden + column // 8).to(tl.int32) >> (column % 8)) & 1
    kept = (hidden == 0) | (column == row.stop_at)
    b = tl.where(kept, b, float("-inf"))
    t = tl.where(kept, t, float("-inf"))
    q_log, _, _, _, _, _ = weigh(b, t, mix, True)
    return column, q_log, (b > float("-inf")) | (t > float("-inf"))


@triton.jit
def rest_tile(
    row, ids, start, mix, share, R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr
):
    """(q − D)₊ of a tile in float64, log2 q, the columns and the ids."""
    b, t, cols = pair_tile(row, start, R, FULL, NUCLEUS, True)
    q_log, _, _, p_rel, _, _ = weigh(b, t, mix, True)
    rest = tl.maximum(tl.exp2(q_log) - share * tl.exp2(p_rel - mix.p_size), 0.0)
    numbers = cols
    if not FULL:
        numbers = tl.load(ids + cols, mask=cols < row.length, other=0)
    return rest.to(tl.float64), q_log, cols, numbers


@triton.jit
def draw_block(
    row,
    ids,
    mix,
    mass_B,
    share,
    uniform,
    R: tl.constexpr,
    FULL: tl.constexpr,
    NUCLEUS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The block of ids to draw from; that of copied candidates is found by their ids.

    Args:
        mass_B: the mass of (q − D)₊ in each block of columns.
    """
    blocks_B = tl.arange(0, BLOCKS)
    mass_B = mass_B.to(tl.float64)
    if not FULL:
        mass_B = tl.zeros((BLOCKS,), tl.float64)
        for start in range(0, row.length, R * 8):
            rest, _, _, numbers = rest_tile(row, ids, start, mix, share, R, FULL, NUCLEUS)
            for block in range(BLOCKS):
                mass = tl.sum(tl.where(numbers // BLOCK == block, rest, 0.0))
                mass_B += tl.where(blocks_B == block, mass, 0.0)
    return first_place(arrivals(mass_B, blocks_B.to(tl.int64) + FIRST_BLOCK, uniform), blocks_B)


@triton.jit
def redraw(
    row,
    ids,
    mix,
    mass_B,
    share,
    uniform,
    R: tl.constexpr,
    FULL: tl.constexpr,
    NUCLEUS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A column and its log2 q, by Gumbel noise from (q − D)₊.

    Args:
        mix: a Mixture.
        mass_B: the mass of (q − D)₊ in each block of columns.
        share: D is p times that; 0 draws from q.
    """
    block = draw_block(row, ids, mix, mass_B, share, uniform, R, FULL, NUCLEUS, BLOCK, BLOCKS)
    start_at = block * BLOCK if FULL else 0
    end_at = tl.minimum(start_at + BLOCK, row.length) if FULL else row.length
    column = tl.full((), FAR, tl.int32)
    least = tl.full((), float("inf"), tl.float64)
    log_q = tl.full((), float("-inf"), tl.float32)
    likeliest = tl.zeros((), tl.int32)  # taken should rounding leave nothing of (q − D)₊ here
    most = log_q
    for start in range(start_at, end_at, R * 8):
        rest, q_log, cols, numbers = rest_tile(row, ids, start, mix, share, R, FULL, NUCLEUS)
        arrival = arrivals(tl.where(numbers // BLOCK == block, rest, 0.0), numbers, uniform)
        here = tl.min(arrival)
        if here < least:
            least = here
            column = first_place(arrival, cols)
            log_q = tl.sum(tl.where(cols == column, q_log, 0.0))
        top = tl.max(q_log)
        if top > most:
            most = top
            likeliest = tl.min(tl.where(q_log == top, cols, FAR))
    missed = column == FAR
    return tl.where(missed, likeliest, column), tl.where(missed, most, log_q)


@triton.jit
def take_likeliest(
    row,
    mix,
    most_B,
    R: tl.constexpr,
    FULL: tl.constexpr,
    NUCLEUS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The most likely column, the lowest of several, and its log2 q.

    Args:
        mix: a Mixture.
        most_B: the largest log2 q in each block of columns.
    """
    blocks_B = tl.arange(0, BLOCKS)
    used = blocks_B * BLOCK < row.length
    best = tl.max(tl.where(used, most_B, float("-inf")))
    block = tl.min(tl.where(used & (most_B == best), blocks_B, BLOCKS - 1))
    column = tl.full((), FAR, tl.int32)
    log_q = tl.full((), float("-inf"), tl.float32)
    for start in range(block * BLOCK, tl.minimum((block + 1) * BLOCK, row.length), R * 8):
        b, t, cols = pair_tile(row, start, R, FULL, NUCLEUS, True)
        q_log, _, _, _, _, _ = weigh(b, t, mix, True)
        top = tl.max(q_log)
        if top > log_q:
            log_q = top
            column = tl.min(tl.where(q_log == top, cols, FAR))
    return column, log_q

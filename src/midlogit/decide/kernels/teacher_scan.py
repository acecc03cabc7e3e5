"""The kernel that looks over the teacher's row, one program a decision; knows where a nucleus is to be looked for.

It finds the raw log-sum-exp, the peak and the stop class, and for a row with a support constraint a bracket around the
nucleus and, if they are few, a copy of the candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from midlogit.decide.kernels.draft import DRAFTS, SETTINGS
from midlogit.decide.kernels.nucleus import bucket_floor, compact, in_order, masses_above, narrow
from midlogit.decide.kernels.tiles import (
    LN2,
    LOG2E,
    LOWEST,
    TEACHER,
    columns,
    hidden_tile,
    log_total,
    stop_sums,
)

# raw log-sum-exp, peak, stop class tempered and raw, stop id to emit, candidates (−1: not copied), bracket of the
# nucleus (low, high) and its masses, mass to reach, lowest
STATE = tl.constexpr(12)  # columns, float64, one row a decision
SLACK = tl.constexpr(3e-8)  # what float32 sums may miss of the nucleus' mass


@triton.jit
def survey(row, width, R: tl.constexpr):
    """The teacher's raw log-sum-exp; of the ids that are not hidden, the largest logit, and the smallest or 0.

    The row goes on to `width` with ids that cannot be drawn and count only as mass of the model.
    A raw result that is not finite gives a row with NaN, +inf or nothing but −inf away.
    """
    peak = tl.full((R,), LOWEST, tl.float32)
    top = tl.full((R,), float("-inf"), tl.float32)
    mass = tl.zeros((R,), tl.float32)
    lowest = mass
    for start in range(0, row[2], R * 8):
        cols = columns(start, R)
        t = tl.load(row[TEACHER] + cols, mask=cols < row[2], other=float("-inf")).to(tl.float32)
        high = tl.max(t, axis=1)
        low = tl.min(t, axis=1)
        new = tl.maximum(peak, high)
        mass = mass * tl.exp2((peak - new) * LOG2E) + tl.sum(tl.exp2((t - new[:, None]) * LOG2E), axis=1)
        peak = new
        if tl.load(row[4] + start // (R * 8)) != 0:
            hide = hidden_tile(row[3], start, R)
            high = tl.max(tl.where(hide, float("-inf"), t), axis=1)
            low = tl.min(tl.where(hide, 0.0, t), axis=1)
        lowest = tl.minimum(lowest, low)
        top = tl.maximum(top, high)
    for start in range(row[2], width, R * 8):
        cols = columns(start, R)
        t = tl.load(row[TEACHER] + cols, mask=cols < width, other=float("-inf")).to(tl.float32)
        new = tl.maximum(peak, tl.max(t, axis=1))
        mass = mass * tl.exp2((peak - new) * LOG2E) + tl.sum(tl.exp2((t - new[:, None]) * LOG2E), axis=1)
        peak = new
    return log_total(peak, mass), tl.max(top), tl.min(lowest)


@triton.jit
def survey_kernel(
    base, base_stride, teacher, teacher_stride, width, length, settings, hidden, hidden_stride, dirty, dirty_stride,
    stops, drafts, state, few_base, few_teacher, few_ids,
    R: tl.constexpr, STOPS: tl.constexpr, SHIFT: tl.constexpr, NUCLEUS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    s = settings + n * SETTINGS
    base_row = tl.load(s).to(tl.int64)
    drafted = drafts + base_row * DRAFTS
    base += base_row * base_stride
    teacher += tl.load(s + 1).to(tl.int64) * teacher_stride
    alphabet = tl.load(s + 2).to(tl.int32)
    inv_t = tl.load(s + 3)
    hidden += alphabet * hidden_stride
    dirty += alphabet * dirty_stride

    places = tl.arange(0, STOPS)
    stop_ids = tl.load(stops + alphabet * STOPS + places)
    stop_at = tl.load(stops + alphabet * STOPS)
    stop_raw, stop, x = stop_sums(teacher, stop_ids, width, inv_t)
    emitted = tl.sum(tl.where(places == tl.min(tl.where(x == tl.max(x), places, STOPS - 1)), stop_ids, 0))

    stop_base = tl.load(drafted + 5).to(tl.float32)
    row = (base, teacher, length, hidden, dirty, stop_at, stop_base, stop.to(tl.float32))
    lse, t_peak, lowest = survey(row, width, R)
    t_peak = tl.maximum(t_peak, row[7])

    count = tl.full((), -1, tl.int32)
    low = in_order(tl.full((), LOWEST, tl.float32)) >> SHIFT
    high = (in_order(t_peak) >> SHIFT) + 1
    low_mass = tl.full((), 0.0, tl.float64)
    high_mass = tl.full((), 0.0, tl.float64)
    target = tl.full((), 0.0, tl.float64)
    if NUCLEUS:
        top_p = tl.load(s + 5)
        sound = (tl.abs(tl.load(drafted + 3)) < float("inf")) & (tl.abs(lse) < float("inf")) & (t_peak > float("-inf"))
        if (top_p < 1.0) & sound:
            scale = (inv_t / LN2).to(tl.float32)
            i = tl.arange(0, 8).to(tl.float32)
            depth = (0.7 + i * (0.75 + 0.195 * i)) / inv_t.to(tl.float32)  # to 15.5 nats below the peak
            k_8 = tl.minimum(tl.maximum(in_order(t_peak - depth) >> SHIFT, low + 1), high - 1)
            m_8, low_mass = masses_above(row, bucket_floor(k_8, SHIFT), t_peak, scale, R, True)
            target = top_p * low_mass * (1 - SLACK)
            low, low_mass, high, high_mass = narrow(low, low_mass, high, high_mass, k_8, m_8, target)
            floor = bucket_floor(low, SHIFT)
            most = low_mass * tl.exp2(tl.minimum((t_peak - floor) * scale, 100.0)).to(tl.float64)
            if (length <= CAPACITY) | (most <= 64 * CAPACITY):
                at = n.to(tl.int64) * CAPACITY
                count = compact(row, floor, few_base + at, few_teacher + at, few_ids + at, R, CAPACITY)
                count = tl.where(count > CAPACITY, -1, count)

    out = state + n * STATE
    tl.store(out, lse)
    tl.store(out + 1, t_peak.to(tl.float64))
    tl.store(out + 2, stop)
    tl.store(out + 3, stop_raw)
    tl.store(out + 4, emitted.to(tl.float64))
    tl.store(out + 5, count.to(tl.float64))
    tl.store(out + 6, (low << SHIFT).to(tl.float64))
    tl.store(out + 7, (high << SHIFT).to(tl.float64))
    tl.store(out + 8, low_mass)
    tl.store(out + 9, high_mass)
    tl.store(out + 10, target)
    tl.store(out + 11, lowest.to(tl.float64))

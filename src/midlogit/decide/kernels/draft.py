"""The kernel that drafts, one program a row of the base; knows the base alone, and what later kernels need of it.

The draft is drawn from D, the base after temperature, masks and merged stops, by one sweep and a second look at one
group of tiles. The sweep also finds what the decision needs of the base row, so no kernel after it does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from midlogit.decide.kernels.tiles import (
    BASE,
    FAR,
    LN2,
    LOG2E,
    LOWEST,
    column_at,
    columns,
    group_at,
    hidden_tile,
    log_total,
    side_tile,
    stop_sums,
    total,
)

# base row, teacher row, alphabet, 1/T, greedy, top_p, tolerance, rule, value, forced, draft, accept, redraw
SETTINGS = tl.constexpr(13)  # columns, float64, one row a decision
# outcome, peak, log2 of the mass relative to it, raw log-sum-exp, lowest, stop class tempered and raw
DRAFTS = tl.constexpr(7)  # columns, float64, one row for each row of the base's buffer


@triton.jit
def draft_sweep(row, width, scale, tempered, R: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Of the ids that are not hidden the mass of each GROUP tiles, and what is to be known of the whole row.

    The row goes on to `width` with ids that cannot be drawn and count only as mass of the model.

    Returns:
        For each group the largest logit met until its end and its mass relative to that; the largest logit, LOWEST
        if there is none; the raw log-sum-exp of all ids; the smallest logit, or 0.
    """
    peak = tl.full((R,), LOWEST, tl.float32)
    raw = tl.zeros((R,), tl.float32)  # relative to peak, at temperature 1
    shut_peak = peak
    shut = raw  # the same for hidden ids
    lowest = raw
    peak_G = tl.full((GROUPS,), LOWEST, tl.float32)
    mass_G = tl.zeros((GROUPS,), tl.float64)
    for group in range(0, row[2], GROUP * R * 8):
        mass = tl.zeros((R,), tl.float32)
        for start in range(group, tl.minimum(group + GROUP * R * 8, row[2]), R * 8):
            cols = columns(start, R)
            b = tl.load(row[0] + cols, mask=cols < row[2], other=float("-inf")).to(tl.float32)
            low = tl.min(b, axis=1)
            if tl.load(row[4] + start // (R * 8)) != 0:
                hide = hidden_tile(row[3], start, R)
                low = tl.min(tl.where(hide, 0.0, b), axis=1)
                x = tl.where(hide, b, float("-inf"))
                new = tl.maximum(shut_peak, tl.max(x, axis=1))
                shut = shut * tl.exp2((shut_peak - new) * LOG2E)
                shut += tl.sum(tl.exp2((x - new[:, None]) * LOG2E), axis=1)
                shut_peak = new
                b = tl.where(hide, float("-inf"), b)
            lowest = tl.minimum(lowest, low)
            new = tl.maximum(peak, tl.max(b, axis=1))
            mass = mass * tl.exp2((peak - new) * scale) + tl.sum(tl.exp2((b - new[:, None]) * scale), axis=1)
            if tempered:
                raw = raw * tl.exp2((peak - new) * LOG2E) + tl.sum(tl.exp2((b - new[:, None]) * LOG2E), axis=1)
            peak = new
        top = tl.max(peak)
        mine = tl.arange(0, GROUPS) == group // (GROUP * R * 8)
        peak_G = tl.where(mine, top, peak_G)
        mass_G = tl.where(mine, total(mass * tl.exp2((peak - top) * scale)), mass_G)
    for start in range(row[2], width, R * 8):
        cols = columns(start, R)
        x = tl.load(row[0] + cols, mask=cols < width, other=float("-inf")).to(tl.float32)
        new = tl.maximum(shut_peak, tl.max(x, axis=1))
        shut = shut * tl.exp2((shut_peak - new) * LOG2E)
        shut += tl.sum(tl.exp2((x - new[:, None]) * LOG2E), axis=1)
        shut_peak = new
    top = tl.max(peak)
    mass_G *= tl.exp2((peak_G - top) * scale)
    open_lse = tl.log(tl.sum(mass_G)) + top
    if tempered:
        open_lse = log_total(peak, raw)
    shut_lse = log_total(shut_peak, shut)
    most = tl.maximum(open_lse, shut_lse)
    raw_lse = most + tl.log(tl.exp(open_lse - most) + tl.exp(shut_lse - most))
    return peak_G, mass_G, top, raw_lse, tl.min(lowest)


@triton.jit(do_not_specialize=["first"])
def draft_kernel(
    base, base_stride, width, length, settings, first, hidden, hidden_stride, dirty, dirty_stride, stops, drafts,
    tokens,
    R: tl.constexpr, STOPS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    s = settings + (first + n) * SETTINGS
    at = tl.load(s).to(tl.int64)
    base += at * base_stride
    alphabet = tl.load(s + 2).to(tl.int32)
    inv_t = tl.load(s + 3)
    scale = (inv_t / LN2).to(tl.float32)
    greedy = tl.load(s + 4) != 0
    uniform = tl.load(s + 10)
    stop_ids = tl.load(stops + alphabet * STOPS + tl.arange(0, STOPS))
    stop_at = tl.load(stops + alphabet * STOPS)
    stop_raw, stop, _ = stop_sums(base, stop_ids, width, inv_t)
    stop32 = stop.to(tl.float32)
    hidden += alphabet * hidden_stride
    dirty += alphabet * dirty_stride
    row = (base, base, length, hidden, dirty, stop_at, stop32, stop32)

    SPAN: tl.constexpr = GROUP * R * 8
    groups_G = tl.arange(0, GROUPS)
    peak_G, mass_G, top, raw_lse, lowest = draft_sweep(row, width, scale, inv_t != 1.0, R, GROUP, GROUPS)
    peak = tl.maximum(top, stop32)
    mass_G *= tl.exp2((top - peak) * scale)
    stop_group = tl.where(stop_at >= 0, stop_at // SPAN, -1)
    mass_G += tl.where(groups_G == stop_group, tl.exp2((stop32 - peak) * scale), 0.0)
    mass = tl.sum(mass_G)

    if greedy:
        group = tl.min(tl.where(peak_G == peak, groups_G, GROUPS - 1))
        group = tl.where((stop_group >= 0) & (stop32 == peak), tl.minimum(group, stop_group), group)
        goal = mass * 0.0
    else:
        group, goal = group_at(mass_G, uniform, GROUPS)
    column = tl.full((), FAR, tl.int32)
    final = tl.zeros((), tl.int32)  # the last column with mass, should rounding leave the goal beyond all
    for start in range(group * SPAN, tl.minimum((group + 1) * SPAN, length), R * 8):
        b, cols = side_tile(row, start, R, BASE, True)
        if greedy:
            column = tl.minimum(column, tl.min(tl.where(b == peak, cols, FAR)))
        elif column == FAR:
            each = tl.exp2((b - peak) * scale).to(tl.float64)
            lane = tl.sum(each, axis=1)
            here = tl.sum(lane)
            if here > 0:
                column, last = column_at(each, lane, cols, goal)
                final = tl.maximum(final, last)
            goal -= here
    column = tl.where(column == FAR, final, column)
    some = mass > 0
    column = tl.where(some & (tl.abs(raw_lse) < float("inf")) & (column < length), column, 0)

    out = drafts + at * DRAFTS
    tl.store(out, column.to(tl.float64))
    tl.store(out + 1, tl.where(some, peak, float("-inf")).to(tl.float64))
    tl.store(out + 2, tl.where(some, tl.log(tl.where(some, mass, 1.0)) / LN2, 0.0))
    tl.store(out + 3, raw_lse)
    tl.store(out + 4, lowest.to(tl.float64))
    tl.store(out + 5, stop)
    tl.store(out + 6, stop_raw)
    tl.store(tokens + n, column.to(tl.int64))

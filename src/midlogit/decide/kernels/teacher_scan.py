"""The kernel that scans the teacher's row, one program per decision; knows where a nucleus is to be looked for.

It finds the raw log-sum-exp, the peak and the stop class. For a row with a support constraint it also finds a bracket
around the nucleus and, if they are few, copies the candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from midlogit.decide.kernels.layout import (  # isort: skip
    DRAFT_COLUMNS, DRAFT_LSE, DRAFT_STOP, DRAFT_STOP_ID,
    SCAN_CANDIDATES, SCAN_COLUMNS, SCAN_HIGH, SCAN_HIGH_MASS, SCAN_LOW, SCAN_LOW_MASS, SCAN_LOWEST,
    SCAN_LSE, SCAN_PEAK, SCAN_STOP, SCAN_STOP_BASE, SCAN_STOP_ID, SCAN_STOP_RAW, SCAN_STOP_TEACHER,
    SCAN_TARGET_MASS, SCAN_TEMPERED_LSE,
    SETTING_ALPHABET, SETTING_BASE_ROW, SETTING_BASE_STOP, SETTING_COLUMNS, SETTING_GIVEN,
    SETTING_INV_TEMPERATURE, SETTING_TEACHER_ROW, SETTING_TOP_P,
)  # fmt: skip
from midlogit.decide.kernels.nucleus import bucket_floor, compact, in_order, masses_above, narrow
from midlogit.decide.kernels.tiles import (
    FAR,
    LN2,
    LOG2E,
    LOWEST,
    RowPair,
    columns,
    hidden_ids,
    log_total,
    stop_sums,
    tempered_total,
)

SLACK = tl.constexpr(3e-8)  # what float32 sums may miss of the nucleus' mass


@triton.jit
def scan_teacher(row, width, scale, inv_temperature, R: tl.constexpr):
    """Sums over a row of the teacher.

    Args:
        row: a RowPair.
        width: the ids from row.length to here cannot be drawn and count only as mass of the model.
        scale: log2(e) / temperature.

    Returns:
        The raw log-sum-exp of all ids, which is not finite for a row with NaN, +inf or nothing but −inf, and the
        tempered one; of the ids that are not hidden, the largest logit, and the smallest or 0.
    """
    is_tempered = inv_temperature != 1.0
    peak = tl.full((R,), LOWEST, tl.float32)
    top = tl.full((R,), float("-inf"), tl.float32)
    mass = tl.zeros((R,), tl.float32)
    tempered = mass
    lowest = mass
    for start in range(0, row.length, R * 8):
        cols = columns(start, R)
        t = tl.load(row.teacher + cols, mask=cols < row.length, other=float("-inf")).to(tl.float32)
        high = tl.max(t, axis=1)
        low = tl.min(t, axis=1)
        new = tl.maximum(peak, high)
        mass = mass * tl.exp2((peak - new) * LOG2E) + tl.sum(
            tl.exp2((t - new[:, None]) * LOG2E), axis=1
        )
        if is_tempered:
            tempered = tempered * tl.exp2((peak - new) * scale)
            tempered += tl.sum(tl.exp2((t - new[:, None]) * scale), axis=1)
        peak = new
        if tl.load(row.hidden_tiles + start // (R * 8)) != 0:
            hide = hidden_ids(row.hidden, start, R)
            high = tl.max(tl.where(hide, float("-inf"), t), axis=1)
            low = tl.min(tl.where(hide, 0.0, t), axis=1)
        lowest = tl.minimum(lowest, low)
        top = tl.maximum(top, high)
    for start in range(row.length, width, R * 8):
        cols = columns(start, R)
        t = tl.load(row.teacher + cols, mask=cols < width, other=float("-inf")).to(tl.float32)
        new = tl.maximum(peak, tl.max(t, axis=1))
        mass = mass * tl.exp2((peak - new) * LOG2E) + tl.sum(
            tl.exp2((t - new[:, None]) * LOG2E), axis=1
        )
        if is_tempered:
            tempered = tempered * tl.exp2((peak - new) * scale)
            tempered += tl.sum(tl.exp2((t - new[:, None]) * scale), axis=1)
        peak = new
    lse = log_total(peak, mass)
    tempered_lse = lse
    if is_tempered:
        tempered_lse = tempered_total(peak, tempered, scale, inv_temperature)
    return lse, tempered_lse, tl.max(top), tl.min(lowest)


@triton.jit
def teacher_scan_kernel(
    # Logits of both models; `length` ids of the base's `base_width` and the teacher's `width` can be drawn.
    base, base_stride, teacher, teacher_stride, base_width, width, length,
    # Settings and alphabets.
    settings, hidden, hidden_stride, hidden_tiles, hidden_tiles_stride, stops,
    # The table of drafts.
    drafts,
    # Results: the table of scans, and the copies of candidates.
    scans, few_base, few_teacher, few_ids,
    # Sizes: lanes of a tile, ids of a stop class, low bits that a row's type lacks, copied candidates.
    R: tl.constexpr, STOPS: tl.constexpr, SHIFT: tl.constexpr, NUCLEUS: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    settings += n * SETTING_COLUMNS
    scans += n * SCAN_COLUMNS
    base_row = tl.load(settings + SETTING_BASE_ROW).to(tl.int64)
    drafts += base_row * DRAFT_COLUMNS
    base += base_row * base_stride
    teacher += tl.load(settings + SETTING_TEACHER_ROW).to(tl.int64) * teacher_stride
    alphabet = tl.load(settings + SETTING_ALPHABET).to(tl.int32)
    inv_temperature = tl.load(settings + SETTING_INV_TEMPERATURE)
    scale = (inv_temperature / LN2).to(tl.float32)

    places = tl.arange(0, STOPS)
    stop_ids = tl.load(stops + alphabet * STOPS + places)
    stop_at = tl.load(stops + alphabet * STOPS)
    stop_raw, stop, x = stop_sums(teacher, stop_ids, width, inv_temperature)
    stop_id = tl.sum(
        tl.where(places == tl.min(tl.where(x == tl.max(x), places, STOPS - 1)), stop_ids, 0)
    )
    if tl.load(settings + SETTING_BASE_STOP) != 0:
        stop_id = tl.load(drafts + DRAFT_STOP_ID).to(tl.int32)
    given = tl.load(settings + SETTING_GIVEN).to(tl.int32)
    ends = (given >= 0) & (tl.max((stop_ids == given).to(tl.int32)) != 0)
    stop_id = tl.where(ends, given, stop_id)
    some_stop = stop_id >= 0
    stop_base = tl.load(
        base + stop_id, mask=some_stop & (stop_id < base_width), other=float("-inf")
    ).to(tl.float64)
    stop_teacher = tl.load(
        teacher + stop_id, mask=some_stop & (stop_id < width), other=float("-inf")
    ).to(tl.float64)

    row = RowPair(
        base=base, teacher=teacher, length=length,
        hidden=hidden + alphabet * hidden_stride,
        hidden_tiles=hidden_tiles + alphabet * hidden_tiles_stride,
        stop_at=stop_at, stop_base=tl.load(drafts + DRAFT_STOP).to(tl.float32),
        stop_teacher=stop.to(tl.float32),
        tau=float("-inf"), tie=FAR,
    )  # fmt: skip
    lse, tempered_lse, t_peak, lowest = scan_teacher(row, width, scale, inv_temperature, R)
    t_peak = tl.maximum(t_peak, row.stop_teacher)

    # The bracket of the nucleus, and its candidates.
    count = tl.full((), -1, tl.int32)
    low = in_order(tl.full((), LOWEST, tl.float32)) >> SHIFT
    high = (in_order(t_peak) >> SHIFT) + 1
    low_mass = tl.full((), 0.0, tl.float64)
    high_mass = tl.full((), 0.0, tl.float64)
    target = tl.full((), 0.0, tl.float64)
    if NUCLEUS:
        top_p = tl.load(settings + SETTING_TOP_P)
        base_lse = tl.load(drafts + DRAFT_LSE)
        sound = (
            (tl.abs(base_lse) < float("inf"))
            & (tl.abs(lse) < float("inf"))
            & (t_peak > float("-inf"))
        )
        if (top_p < 1.0) & sound:
            i = tl.arange(0, 8).to(tl.float32)
            depth = (0.7 + i * (0.75 + 0.195 * i)) / inv_temperature.to(
                tl.float32
            )  # to 15.5 nats below the peak
            k_8 = tl.minimum(tl.maximum(in_order(t_peak - depth) >> SHIFT, low + 1), high - 1)
            m_8, low_mass = masses_above(row, bucket_floor(k_8, SHIFT), t_peak, scale, R, True)
            target = top_p * low_mass * (1 - SLACK)
            low, low_mass, high, high_mass = narrow(
                low, low_mass, high, high_mass, k_8, m_8, target
            )
            floor = bucket_floor(low, SHIFT)
            most = low_mass * tl.exp2(tl.minimum((t_peak - floor) * scale, 100.0)).to(tl.float64)
            # A given id may be no candidate: the whole rows describe it.
            if (given < 0) & ((length <= CAPACITY) | (most <= 64 * CAPACITY)):
                at = n.to(tl.int64) * CAPACITY
                count = compact(
                    row, floor, few_base + at, few_teacher + at, few_ids + at, R, CAPACITY
                )
                count = tl.where(count > CAPACITY, -1, count)

    tl.store(scans + SCAN_LSE, lse)
    tl.store(scans + SCAN_TEMPERED_LSE, tempered_lse)
    tl.store(scans + SCAN_PEAK, t_peak.to(tl.float64))
    tl.store(scans + SCAN_STOP, stop)
    tl.store(scans + SCAN_STOP_RAW, stop_raw)
    tl.store(scans + SCAN_STOP_ID, stop_id.to(tl.float64))
    tl.store(scans + SCAN_STOP_BASE, stop_base * inv_temperature)
    tl.store(scans + SCAN_STOP_TEACHER, stop_teacher * inv_temperature)
    tl.store(scans + SCAN_CANDIDATES, count.to(tl.float64))
    tl.store(scans + SCAN_LOW, (low << SHIFT).to(tl.float64))
    tl.store(scans + SCAN_HIGH, (high << SHIFT).to(tl.float64))
    tl.store(scans + SCAN_LOW_MASS, low_mass)
    tl.store(scans + SCAN_HIGH_MASS, high_mass)
    tl.store(scans + SCAN_TARGET_MASS, target)
    tl.store(scans + SCAN_LOWEST, lowest.to(tl.float64))

"""The kernel that drafts, one program per row of the base; knows the base alone, and what later kernels need of it.

The draft is drawn from D, the base after temperature, masks and merged stops, by one sweep and a second look at one
block of ids. The sweep also finds all sums over the base's whole row, so that later kernels need none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from midlogit.decide.kernels.layout import (  # isort: skip
    DRAFT_COLUMNS, DRAFT_LOG2_MASS, DRAFT_LOWEST, DRAFT_LSE, DRAFT_OUTCOME, DRAFT_PEAK, DRAFT_STOP,
    DRAFT_STOP_ID, DRAFT_STOP_RAW, DRAFT_TEMPERED_LSE,
    SETTING_ALPHABET, SETTING_BASE_ROW, SETTING_COLUMNS, SETTING_DRAFT_UNIFORM,
    SETTING_ENDING_UNIFORM, SETTING_GREEDY, SETTING_INV_TEMPERATURE,
)  # fmt: skip
from midlogit.decide.kernels.noise import FIRST_BLOCK, arrivals
from midlogit.decide.kernels.tiles import (
    BASE,
    FAR,
    LN2,
    LOG2E,
    LOWEST,
    RowPair,
    columns,
    first_place,
    hidden_ids,
    log_add,
    log_total,
    side_tile,
    stop_place,
    stop_sums,
    tempered_total,
    total,
)


@triton.jit
def draft_sweep(
    row,
    width,
    scale,
    inv_temperature,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Sums over a row of the base.

    Args:
        row: a RowPair; its teacher is not read.
        width: the ids from row.length to here cannot be drawn and count only as mass of the model.
        scale: log2(e) / temperature.

    Returns:
        Per block of BLOCK ids, of those that are not hidden: the largest logit up to its end, and its mass relative to
        that. Then the largest of these logits, LOWEST if there is none; the log-sum-exp of all ids, raw and tempered;
        the smallest logit that is not hidden, or 0.
    """
    tempered = inv_temperature != 1.0
    peak = tl.full((R,), LOWEST, tl.float32)
    raw = tl.zeros((R,), tl.float32)  # relative to peak, at temperature 1
    shut_peak = peak
    shut = raw  # the same for hidden ids
    shut_tempered = raw
    lowest = raw
    peak_B = tl.full((BLOCKS,), LOWEST, tl.float32)
    mass_B = tl.zeros((BLOCKS,), tl.float64)
    for block in range(0, row.length, BLOCK):
        mass = tl.zeros((R,), tl.float32)
        for start in range(block, tl.minimum(block + BLOCK, row.length), R * 8):
            cols = columns(start, R)
            b = tl.load(row.base + cols, mask=cols < row.length, other=float("-inf")).to(tl.float32)
            low = tl.min(b, axis=1)
            if tl.load(row.hidden_tiles + start // (R * 8)) != 0:
                hide = hidden_ids(row.hidden, start, R)
                low = tl.min(tl.where(hide, 0.0, b), axis=1)
                x = tl.where(hide, b, float("-inf"))
                new = tl.maximum(shut_peak, tl.max(x, axis=1))
                shut = shut * tl.exp2((shut_peak - new) * LOG2E)
                shut += tl.sum(tl.exp2((x - new[:, None]) * LOG2E), axis=1)
                if tempered:
                    shut_tempered = shut_tempered * tl.exp2((shut_peak - new) * scale)
                    shut_tempered += tl.sum(tl.exp2((x - new[:, None]) * scale), axis=1)
                shut_peak = new
                b = tl.where(hide, float("-inf"), b)
            lowest = tl.minimum(lowest, low)
            new = tl.maximum(peak, tl.max(b, axis=1))
            mass = mass * tl.exp2((peak - new) * scale) + tl.sum(
                tl.exp2((b - new[:, None]) * scale), axis=1
            )
            if tempered:
                raw = raw * tl.exp2((peak - new) * LOG2E) + tl.sum(
                    tl.exp2((b - new[:, None]) * LOG2E), axis=1
                )
            peak = new
        top = tl.max(peak)
        mine = tl.arange(0, BLOCKS) == block // BLOCK
        peak_B = tl.where(mine, top, peak_B)
        mass_B = tl.where(mine, total(mass * tl.exp2((peak - top) * scale)), mass_B)
    for start in range(row.length, width, R * 8):
        cols = columns(start, R)
        x = tl.load(row.base + cols, mask=cols < width, other=float("-inf")).to(tl.float32)
        new = tl.maximum(shut_peak, tl.max(x, axis=1))
        shut = shut * tl.exp2((shut_peak - new) * LOG2E)
        shut += tl.sum(tl.exp2((x - new[:, None]) * LOG2E), axis=1)
        if tempered:
            shut_tempered = shut_tempered * tl.exp2((shut_peak - new) * scale)
            shut_tempered += tl.sum(tl.exp2((x - new[:, None]) * scale), axis=1)
        shut_peak = new
    top = tl.max(peak)
    mass_B *= tl.exp2((peak_B - top) * scale)
    open_lse = tl.log(tl.sum(mass_B)) + top.to(tl.float64) * inv_temperature
    shut_lse = log_total(shut_peak, shut)
    if tempered:
        tempered_lse = log_add(
            open_lse, tempered_total(shut_peak, shut_tempered, scale, inv_temperature)
        )
        raw_lse = log_add(log_total(peak, raw), shut_lse)
    else:
        raw_lse = log_add(open_lse, shut_lse)
        tempered_lse = raw_lse
    return peak_B, mass_B, top, raw_lse, tempered_lse, tl.min(lowest)


@triton.jit(do_not_specialize=["first"])
def draft_kernel(
    # Logits of the base; `length` of `width` ids can be drawn.
    base, base_stride, width, length,
    # Settings, from decision `first` on.
    settings, first,
    # Alphabets.
    hidden, hidden_stride, hidden_tiles, hidden_tiles_stride, stops,
    # Results: the table of drafts by row of the base, ids by decision.
    drafts, tokens,
    # Sizes: lanes of a tile, ids of a stop class, ids of a block, blocks.
    R: tl.constexpr, STOPS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    settings += (first + n) * SETTING_COLUMNS
    base_row = tl.load(settings + SETTING_BASE_ROW).to(tl.int64)
    base += base_row * base_stride
    drafts += base_row * DRAFT_COLUMNS
    alphabet = tl.load(settings + SETTING_ALPHABET).to(tl.int32)
    inv_temperature = tl.load(settings + SETTING_INV_TEMPERATURE)
    scale = (inv_temperature / LN2).to(tl.float32)
    greedy = tl.load(settings + SETTING_GREEDY) != 0
    uniform = tl.load(settings + SETTING_DRAFT_UNIFORM)

    stop_ids = tl.load(stops + alphabet * STOPS + tl.arange(0, STOPS))
    stop_at = tl.load(stops + alphabet * STOPS)
    stop_raw, stop, x = stop_sums(base, stop_ids, width, inv_temperature)
    ending = tl.load(settings + SETTING_ENDING_UNIFORM)
    place = stop_place(x, stop_ids, ending, greedy, inv_temperature, STOPS)
    stop_id = tl.load(stops + alphabet * STOPS + place)
    stop32 = stop.to(tl.float32)
    row = RowPair(
        base=base, teacher=base, length=length,
        hidden=hidden + alphabet * hidden_stride,
        hidden_tiles=hidden_tiles + alphabet * hidden_tiles_stride,
        stop_at=stop_at, stop_base=stop32, stop_teacher=stop32,
        tau=float("-inf"), tie=FAR,
    )  # fmt: skip

    # Masses of the blocks, the stop class among them.
    blocks_B = tl.arange(0, BLOCKS)
    peak_B, mass_B, top, raw_lse, tempered_lse, lowest = draft_sweep(
        row, width, scale, inv_temperature, R, BLOCK, BLOCKS
    )
    peak = tl.maximum(top, stop32)
    mass_B *= tl.exp2((top - peak) * scale)
    stop_block = tl.where(stop_at >= 0, stop_at // BLOCK, -1)
    mass_B += tl.where(blocks_B == stop_block, tl.exp2((stop32 - peak) * scale), 0.0)
    mass = tl.sum(mass_B)

    # The block of the draft, then its column there.
    if greedy:
        block = tl.min(tl.where(peak_B == peak, blocks_B, BLOCKS - 1))
        block = tl.where((stop_block >= 0) & (stop32 == peak), tl.minimum(block, stop_block), block)
    else:
        arrival_B = arrivals(mass_B, blocks_B.to(tl.int64) + FIRST_BLOCK, uniform)
        block = first_place(arrival_B, blocks_B)
    column = tl.full((), FAR, tl.int32)
    least = tl.full((), float("inf"), tl.float64)  # arrival of that column
    for start in range(block * BLOCK, tl.minimum((block + 1) * BLOCK, length), R * 8):
        b, cols = side_tile(row, start, R, BASE, True)
        if greedy:
            column = tl.minimum(column, tl.min(tl.where(b == peak, cols, FAR)))
        else:
            arrival = arrivals(tl.exp2((b - peak) * scale).to(tl.float64), cols, uniform)
            here = tl.min(arrival)
            if here < least:
                column = first_place(arrival, cols)
                least = here
    some = mass > 0
    column = tl.where(some & (tl.abs(raw_lse) < float("inf")) & (column < length), column, 0)

    tl.store(drafts + DRAFT_OUTCOME, column.to(tl.float64))
    tl.store(drafts + DRAFT_PEAK, tl.where(some, peak, float("-inf")).to(tl.float64))
    tl.store(drafts + DRAFT_LOG2_MASS, tl.where(some, tl.log(tl.where(some, mass, 1.0)) / LN2, 0.0))
    tl.store(drafts + DRAFT_LSE, raw_lse)
    tl.store(drafts + DRAFT_TEMPERED_LSE, tempered_lse)
    tl.store(drafts + DRAFT_LOWEST, lowest.to(tl.float64))
    tl.store(drafts + DRAFT_STOP, stop)
    tl.store(drafts + DRAFT_STOP_RAW, stop_raw)
    tl.store(drafts + DRAFT_STOP_ID, stop_id.to(tl.float64))
    tl.store(tokens + n, column.to(tl.int64))

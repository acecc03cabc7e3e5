"""The kernel that lists the most likely outcomes of q and ids of both models, one program per list.

It knows a Mixture that the solve kernel has stored, and rows; not how q was found. Each list takes two sweeps. The
first finds a score that enough ids reach. The second keeps the best of the ids that reach it, so that few are ever
compared, however long the list. Of equal scores the lower id comes first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from midlogit.decide.kernels.layout import (  # isort: skip
    DRAFT_COLUMNS, DRAFT_LSE, DRAFT_STOP,
    MIXTURE_ALPHA, MIXTURE_B_PEAK, MIXTURE_C, MIXTURE_COLUMNS, MIXTURE_LOG_Z, MIXTURE_Q_SIZE,
    MIXTURE_T_PEAK, MIXTURE_T_SIZE, MIXTURE_TAU, MIXTURE_TIE, MIXTURE_TO_TEACHER,
    RESULT_COLUMNS, RESULT_ERROR,
    SCAN_COLUMNS, SCAN_LSE, SCAN_STOP,
    SETTING_ALPHABET, SETTING_BASE_ROW, SETTING_COLUMNS, SETTING_INV_TEMPERATURE,
    SETTING_TEACHER_ROW, SETTING_TOP_LOGPROBS,
)  # fmt: skip
from midlogit.decide.kernels.nucleus import from_order, in_order
from midlogit.decide.kernels.report import Mixture, weigh
from midlogit.decide.kernels.tiles import BASE, FAR, LN2, TEACHER, RowPair, columns, pair_tile

MIXED = tl.constexpr(2)  # the list of q, after those of both sides
LISTS = tl.constexpr(3)


@triton.jit
def store_mixture(mixtures, mix, row, z, ids, FULL: tl.constexpr):
    """Stores what the top kernel needs of q.

    Args:
        mix: a Mixture. z: Σ q. ids: of the columns, unless they are whole rows.
    """
    tie = row.tie
    if not FULL:
        tie = tl.load(ids + tie, mask=tie < row.length, other=FAR)
    tl.store(mixtures + MIXTURE_B_PEAK, mix.b_peak.to(tl.float64))
    tl.store(mixtures + MIXTURE_T_PEAK, mix.t_peak.to(tl.float64))
    tl.store(mixtures + MIXTURE_C, mix.c.to(tl.float64))
    tl.store(mixtures + MIXTURE_ALPHA, mix.alpha.to(tl.float64))
    tl.store(mixtures + MIXTURE_TO_TEACHER, mix.to_teacher.to(tl.float64))
    tl.store(mixtures + MIXTURE_T_SIZE, mix.t_size.to(tl.float64))
    tl.store(mixtures + MIXTURE_Q_SIZE, mix.q_size.to(tl.float64))
    tl.store(mixtures + MIXTURE_LOG_Z, tl.log(z))
    tl.store(mixtures + MIXTURE_TAU, row.tau.to(tl.float64))
    tl.store(mixtures + MIXTURE_TIE, tie.to(tl.float64))


@triton.jit
def load_mixture(mixtures, scale):
    """The stored Mixture, without what weighs no id."""
    nothing = tl.zeros((), tl.float32)
    return Mixture(
        b_peak=tl.load(mixtures + MIXTURE_B_PEAK).to(tl.float32),
        t_peak=tl.load(mixtures + MIXTURE_T_PEAK).to(tl.float32),
        scale=scale,
        c=tl.load(mixtures + MIXTURE_C).to(tl.float32),
        alpha=tl.load(mixtures + MIXTURE_ALPHA).to(tl.float32),
        to_teacher=tl.load(mixtures + MIXTURE_TO_TEACHER) != 0,
        p_size=nothing,
        t_size=tl.load(mixtures + MIXTURE_T_SIZE).to(tl.float32),
        q_size=tl.load(mixtures + MIXTURE_Q_SIZE).to(tl.float32),
        excess=nothing,
    )


@triton.jit
def score_tile(row, width, mix, start, OF: tl.constexpr, R: tl.constexpr):
    """What a list is ordered by in a tile, and its columns: log2 of q, or a model's raw logits.

    Args:
        row: a RowPair. width: the number of ids. mix: a Mixture.
    """
    if OF == MIXED:
        b, t, cols = pair_tile(row, start, R, True, True, True)
        score, _, _, _, _, _ = weigh(b, t, mix, True)
    else:
        cols = columns(start, R)
        logits = row.base if OF == BASE else row.teacher
        score = tl.load(logits + cols, mask=cols < width, other=float("-inf")).to(tl.float32)
    return score, cols


@triton.jit
def common_floor(row, width, mix, count, OF: tl.constexpr, R: tl.constexpr):
    """A score that at least `count` ids reach: the `count`-th of the best scores at each place of a tile.

    It is −inf where fewer places have any score.
    """
    best = tl.full((R, 8), float("-inf"), tl.float32)
    for start in range(0, width, R * 8):
        score, _ = score_tile(row, width, mix, start, OF, R)
        best = tl.maximum(best, score)
    low = in_order(tl.min(best)).to(tl.int64)
    high = in_order(tl.max(best)).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        reached = tl.sum((best >= from_order(middle.to(tl.int32))).to(tl.int32))
        low = tl.where(reached >= count, middle, low)
        high = tl.where(reached >= count, high, middle)
    return from_order(low.to(tl.int32))


@triton.jit
def best_ids(row, width, mix, count, OF: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """The best `count` ids and their scores in no order, −inf where there are fewer and at places beyond."""
    floor = common_floor(row, width, mix, count, OF, R)
    places_K = tl.arange(0, K)
    ids_K = FAR - places_K  # all different, and behind every id
    scores_K = tl.where(places_K < count, float("-inf"), float("inf"))
    worst = tl.min(scores_K)
    for start in range(0, width, R * 8):
        score, cols = score_tile(row, width, mix, start, OF, R)
        best = tl.max(score)
        while (best >= floor) & (best > worst):
            column = tl.min(tl.where(score == best, cols, FAR))
            last = tl.max(tl.where(scores_K == worst, ids_K, -1))
            scores_K = tl.where(ids_K == last, best, scores_K)
            ids_K = tl.where(ids_K == last, column, ids_K)
            worst = tl.min(scores_K)
            score = tl.where(cols == column, float("-inf"), score)
            best = tl.max(score)
    return tl.where(places_K < count, scores_K, float("-inf")), ids_K


@triton.jit
def store_list(
    # The pair and its Mixture; how many ids there are, and how many to list.
    row,
    width,
    mix,
    count,
    # What turns a score into a log-probability.
    unit,
    log_mass,
    # Results.
    ids,
    logprobs,
    OF: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """Stores a list, most likely first; ids without mass have −inf."""
    scores_K, ids_K = best_ids(row, width, mix, count, OF, R, K)
    for place in range(0, count):
        best = tl.max(scores_K)
        first = tl.min(tl.where(scores_K == best, ids_K, FAR))
        tl.store(ids + place, first)
        tl.store(logprobs + place, best.to(tl.float64) * unit - log_mass)
        scores_K = tl.where(ids_K == first, float("-inf"), scores_K)
        ids_K = tl.where(ids_K == first, FAR, ids_K)


@triton.jit(do_not_specialize=["most"])
def top_kernel(
    # Logits of both models; `length` ids of the base's `base_width` and the teacher's `width` can be drawn.
    base, base_stride, teacher, teacher_stride, base_width, width, length,
    # Settings and alphabets.
    settings, hidden, hidden_stride, hidden_tiles, hidden_tiles_stride, stops,
    # What the kernels before have found.
    drafts, scans, results, mixtures,
    # Results: three lists of `most` places for each decision, of base, teacher and q.
    ids, logprobs, most,
    # Sizes: lanes of a tile, ids of a stop class, the longest list.
    R: tl.constexpr, STOPS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    tl.static_assert(K <= R * 8)
    n = tl.program_id(0) // LISTS
    of = tl.program_id(0) % LISTS
    settings += n * SETTING_COLUMNS
    scans += n * SCAN_COLUMNS
    results += n * RESULT_COLUMNS
    mixtures += n * MIXTURE_COLUMNS
    ids += tl.program_id(0).to(tl.int64) * most
    logprobs += tl.program_id(0).to(tl.int64) * most
    count = tl.load(settings + SETTING_TOP_LOGPROBS).to(tl.int32)
    if (count == 0) | (tl.load(results + RESULT_ERROR) != 0):
        return

    base_row = tl.load(settings + SETTING_BASE_ROW).to(tl.int64)
    drafts += base_row * DRAFT_COLUMNS
    base += base_row * base_stride
    teacher += tl.load(settings + SETTING_TEACHER_ROW).to(tl.int64) * teacher_stride
    alphabet = tl.load(settings + SETTING_ALPHABET).to(tl.int32)
    scale = (tl.load(settings + SETTING_INV_TEMPERATURE) / LN2).to(tl.float32)
    mix = load_mixture(mixtures, scale)
    row = RowPair(
        base=base, teacher=teacher, length=length,
        hidden=hidden + alphabet * hidden_stride,
        hidden_tiles=hidden_tiles + alphabet * hidden_tiles_stride,
        stop_at=tl.load(stops + alphabet * STOPS),
        stop_base=tl.load(drafts + DRAFT_STOP).to(tl.float32),
        stop_teacher=tl.load(scans + SCAN_STOP).to(tl.float32),
        tau=tl.load(mixtures + MIXTURE_TAU).to(tl.float32),
        tie=tl.load(mixtures + MIXTURE_TIE).to(tl.int32),
    )  # fmt: skip

    if of == BASE:
        lse = tl.load(drafts + DRAFT_LSE)
        store_list(row, base_width, mix, count, 1.0, lse, ids, logprobs, BASE, R, K)
    elif of == TEACHER:
        lse = tl.load(scans + SCAN_LSE)
        store_list(row, width, mix, count, 1.0, lse, ids, logprobs, TEACHER, R, K)
    else:
        log_z = tl.load(mixtures + MIXTURE_LOG_Z)
        store_list(row, length, mix, count, LN2, log_z, ids, logprobs, MIXED, R, K)

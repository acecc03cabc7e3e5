"""Sweeps of one Triton program over one pair of rows; knows logits and the mixture, not settings or rules.

A sweep reads both rows once, in tiles of R × 8 ids, keeps one partial sum for each of the R lanes and adds the
lanes in float64 at the end. Everything per id is float32. Exponents are powers of two: `scale` is
log2(e) / temperature, and ℓ (docs/theory.md (3)) is kept in units of log 2.

Differences come before scaling: log t − log p is made from t − b, which is exact for rows that nearly agree,
and the KLs are sums of terms that are never negative, so nothing small is the difference of two large numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1.0e30)  # below every exponent, and finite
FAR = tl.constexpr(2147483647)  # beyond every column
SERIES = tl.constexpr(0.25)  # where the series for e^x − 1 takes over


@triton.jit
def in_order(x):
    """float32 as int32 in the same order; its own inverse but for the type."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def from_order(key):
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def bucket_floor(bucket, SHIFT: tl.constexpr):
    """The least float32 of a bucket, that is of all values whose order agrees but for the last SHIFT bits."""
    return from_order(bucket << SHIFT)


@triton.jit
def bucket_value(bucket, SHIFT: tl.constexpr):
    """The one value of a bucket that a row of the coarser type can hold."""
    return from_order(tl.where(bucket >= 0, bucket << SHIFT, (bucket << SHIFT) | ((1 << SHIFT) - 1)))


@triton.jit
def total(lanes):
    tl.debug_barrier()  # compute-sanitizer sees a sum write where the one before it is still read
    return tl.sum(lanes.to(tl.float64))


@triton.jit
def log1p(x):
    """log(1 + x) of a float64 scalar, exact for small x."""
    u = 1.0 + x
    near = tl.where(u == 1.0, 1.0, u - 1.0)
    return tl.where(u == 1.0, x, tl.log(tl.maximum(u, 1e-300)) * (x / near))


@triton.jit
def columns(start, R: tl.constexpr):
    return start + tl.arange(0, R)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def hidden_tile(hidden, start, R: tl.constexpr):
    """Which ids of a tile are hidden; one byte of the mask holds the eight ids of a lane."""
    bytes_R = tl.load(hidden + start // 8 + tl.arange(0, R)).to(tl.int32)
    return ((bytes_R[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def teacher_tile(row, start, R: tl.constexpr, FULL: tl.constexpr):
    """The teacher's effective logits: −inf where hidden, the stop class in its column.

    `row` is (base, teacher, length, hidden, dirty, stop column, stop base, stop teacher, tau, tie); FULL says
    that hidden ids and the stop class are still to be dealt with.
    """
    cols = columns(start, R)
    t = tl.load(row[1] + cols, mask=cols < row[2], other=float("-inf")).to(tl.float32)
    if FULL:
        if tl.load(row[4] + start // (R * 8)) != 0:
            t = tl.where(hidden_tile(row[3], start, R), float("-inf"), t)
            t = tl.where(cols == row[5], row[7], t)
    return t, cols


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
    """What to take off b, off t and off their difference so that ℓ + c loses no digits.

    Rows at about the same height are subtracted first (exact where they nearly agree), rows far apart each from
    its own peak.
    """
    level = tl.abs(t_peak - b_peak) < 1.0
    return tl.where(level, 0.0, b_peak), tl.where(level, 0.0, t_peak), tl.where(level, t_peak - b_peak, 0.0)


@triton.jit
def expm1_over(x):
    """(e^x − 1) / x for |x| < SERIES."""
    return 1.0 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))


@triton.jit
def curvature(x):
    """(e^x − 1 − x) / x² for |x| < SERIES."""
    return 0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))


@triton.jit
def survey(row, R: tl.constexpr):
    """Raw log-sum-exps of both rows; of the ids that are not hidden, the largest logits and the smallest of all.

    A raw result that is not finite gives a row with NaN, +inf or nothing but −inf away.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    b_peak = tl.full((R,), NOTHING, tl.float32)
    t_peak = b_peak
    b_open = tl.full((R,), float("-inf"), tl.float32)
    t_open = b_open
    b_sum = tl.zeros((R,), tl.float32)
    t_sum = b_sum
    lowest = b_sum
    for start in range(0, row[2], R * 8):
        cols = columns(start, R)
        inside = cols < row[2]
        b = tl.load(row[0] + cols, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(row[1] + cols, mask=inside, other=float("-inf")).to(tl.float32)
        b_top = tl.max(b, axis=1)
        t_top = tl.max(t, axis=1)
        low = tl.min(tl.minimum(b, t), axis=1)
        b_new = tl.maximum(b_peak, b_top)
        t_new = tl.maximum(t_peak, t_top)
        b_mass = tl.exp2((b - b_new[:, None]) * LOG2E)
        t_mass = tl.exp2((t - t_new[:, None]) * LOG2E)
        b_sum = b_sum * tl.exp2((b_peak - b_new) * LOG2E) + tl.sum(b_mass, axis=1)
        t_sum = t_sum * tl.exp2((t_peak - t_new) * LOG2E) + tl.sum(t_mass, axis=1)
        b_peak = b_new
        t_peak = t_new
        if tl.load(row[4] + start // (R * 8)) != 0:
            hide = hidden_tile(row[3], start, R)
            b_top = tl.max(tl.where(hide, float("-inf"), b), axis=1)
            t_top = tl.max(tl.where(hide, float("-inf"), t), axis=1)
            low = tl.min(tl.where(hide, 0.0, tl.minimum(b, t)), axis=1)
        lowest = tl.minimum(lowest, low)
        b_open = tl.maximum(b_open, b_top)
        t_open = tl.maximum(t_open, t_top)
    return (
        log_total(b_peak, b_sum),
        log_total(t_peak, t_sum),
        tl.maximum(tl.max(b_open), row[6]),
        tl.maximum(tl.max(t_open), row[7]),
        tl.min(lowest),
    )


@triton.jit
def log_total(peaks, sums):
    """log Σ of lanes with a peak each, natural."""
    peak = tl.max(peaks)
    mass = total(sums * tl.exp2((peaks - peak) * 1.4426950408889634))
    return tl.where(mass > 0, tl.log(mass), float("-inf")) + peak.to(tl.float64)


@triton.jit
def pick(x_8, i: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, 8) == i, x_8, 0))


@triton.jit
def put(x_8, i: tl.constexpr, value):
    return tl.where(tl.arange(0, 8) == i, value, x_8)


@triton.jit
def masses_above(row, floors_8, t_peak, scale, R: tl.constexpr, FULL: tl.constexpr):
    """The teacher's mass at or above each of eight logits, and all of it; relative to its largest logit."""
    f0 = pick(floors_8, 0)
    f1 = pick(floors_8, 1)
    f2 = pick(floors_8, 2)
    f3 = pick(floors_8, 3)
    f4 = pick(floors_8, 4)
    f5 = pick(floors_8, 5)
    f6 = pick(floors_8, 6)
    f7 = pick(floors_8, 7)
    a0 = tl.zeros((R,), tl.float32)
    a1 = a0
    a2 = a0
    a3 = a0
    a4 = a0
    a5 = a0
    a6 = a0
    a7 = a0
    every = a0
    for start in range(0, row[2], R * 8):
        t, _ = teacher_tile(row, start, R, FULL)
        mass = tl.exp2((t - t_peak) * scale)
        every += tl.sum(mass, axis=1)
        a0 += tl.sum(tl.where(t >= f0, mass, 0.0), axis=1)
        a1 += tl.sum(tl.where(t >= f1, mass, 0.0), axis=1)
        a2 += tl.sum(tl.where(t >= f2, mass, 0.0), axis=1)
        a3 += tl.sum(tl.where(t >= f3, mass, 0.0), axis=1)
        a4 += tl.sum(tl.where(t >= f4, mass, 0.0), axis=1)
        a5 += tl.sum(tl.where(t >= f5, mass, 0.0), axis=1)
        a6 += tl.sum(tl.where(t >= f6, mass, 0.0), axis=1)
        a7 += tl.sum(tl.where(t >= f7, mass, 0.0), axis=1)
    m_8 = tl.zeros((8,), tl.float64)
    m_8 = put(m_8, 0, total(a0))
    m_8 = put(m_8, 1, total(a1))
    m_8 = put(m_8, 2, total(a2))
    m_8 = put(m_8, 3, total(a3))
    m_8 = put(m_8, 4, total(a4))
    m_8 = put(m_8, 5, total(a5))
    m_8 = put(m_8, 6, total(a6))
    m_8 = put(m_8, 7, total(a7))
    return m_8, total(every)


@triton.jit
def narrow(low, low_mass, high, high_mass, k_8, m_8, target):
    """The bracket of buckets [low, high) around the one in which the mass from above reaches the target."""
    reached = m_8 >= target
    new_low = tl.maximum(low, tl.max(tl.where(reached, k_8, low)))
    new_high = tl.minimum(high, tl.min(tl.where(reached, high, k_8)))
    low_mass = tl.minimum(low_mass, tl.min(tl.where(reached, m_8, low_mass)))
    high_mass = tl.maximum(high_mass, tl.max(tl.where(reached, high_mass, m_8)))
    return new_low, low_mass, new_high, high_mass


@triton.jit
def compact(row, floor, out_b, out_t, out_id, R: tl.constexpr, CAPACITY: tl.constexpr):
    """Writes the effective pair and the id of all ids whose teacher logit is at least `floor`, in id order.

    Returns how many there are; those beyond CAPACITY are not written.
    """
    count = 0
    for start in range(0, row[2], R * 8):
        t, cols = teacher_tile(row, start, R, True)
        keep = (t >= floor).to(tl.int32)
        lane = tl.sum(keep, axis=1)
        found = tl.sum(lane)
        if found > 0:
            b, t, cols = pair_tile(row, start, R, True, False, True)
            place = count + (tl.cumsum(lane, axis=0) - lane)[:, None] + tl.cumsum(keep, axis=1) - keep
            write = (keep != 0) & (place < CAPACITY)
            tl.store(out_b + place, b, mask=write)
            tl.store(out_t + place, t, mask=write)
            tl.store(out_id + place, cols, mask=write)
        count += found
    return count


@triton.jit
def last_tie(row, tau, quota, R: tl.constexpr, FULL: tl.constexpr):
    """The id of the `quota`-th outcome whose teacher logit is tau, and the base's largest logit on the support.

    A quota above the number of ties gives FAR.
    """
    seen = tl.zeros((), tl.int32)
    tie = tl.full((), FAR, tl.int32)
    b_open = tl.full((R,), float("-inf"), tl.float32)
    for start in range(0, row[2], R * 8):
        b, t, cols = pair_tile(row, start, R, FULL, False, True)
        equal = (t == tau).to(tl.int32)
        lane = tl.sum(equal, axis=1)
        found = tl.sum(lane)
        if (seen < quota) & (seen + found >= quota):
            rank = seen + (tl.cumsum(lane, axis=0) - lane)[:, None] + tl.cumsum(equal, axis=1)
            tie = tl.sum(tl.where((equal != 0) & (rank == quota), cols, 0))
        seen += found
        kept = (t > tau) | ((equal != 0) & (cols <= tie))
        b_open = tl.maximum(b_open, tl.max(tl.where(kept, b, float("-inf")), axis=1))
    return tie, tl.max(b_open)


@triton.jit
def landmarks(
    row, b_peak, t_peak, scale, R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr, HOLES: tl.constexpr
):
    """Moments of ℓ + c at α = 0, ½ and 1, relative to both peaks, on the common support.

    Returns:
        Σ and the first two moments (unnormalised) of base, middle and teacher; the mass of base and of teacher
        off the common support; Σ (t − p), whose terms cancel where the rows agree; and the middle's Σ |ℓ + c|.
    """
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
    for start in range(0, row[2], R * 8):
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
    return (
        total(p0), total(p1), total(p2), total(w0), total(w1), total(w2), total(t0), total(t1), total(t2),
        total(p_off), total(t_off), total(gap), total(size),
    )  # fmt: skip


@triton.jit
def moments(
    row, b_peak, t_peak, scale, c, alpha,
    R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr, HOLES: tl.constexpr,
):  # fmt: skip
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
    for start in range(0, row[2], R * 8):
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
def close_moments(row, b_peak, t_peak, scale, alpha, R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr):
    """For rows that nearly agree: sums whose terms all have the size of the result.

    With y = ℓ + c: Σ p, Σ p y, Σ p (e^y − 1 − y), Σ p (e^αy − 1 − αy), Σ p y (e^αy − 1), Σ p y² e^αy.
    """
    n0 = tl.zeros((R,), tl.float32)
    n1 = n0
    h1 = n0
    ha = n0
    a1 = n0
    a2 = n0
    at = anchors(b_peak, t_peak)
    natural = scale * LN2
    for start in range(0, row[2], R * 8):
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


@triton.jit
def log_weights(
    row, start, b_peak, t_peak, scale, c, t_size, q_size, alpha, to_teacher,
    R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr, HOLES: tl.constexpr,
):  # fmt: skip
    """log2 of q and of the teacher, ℓ, log2 of the base relative to its peak; the drawable, the common; ids."""
    b, t, cols = pair_tile(row, start, R, FULL, NUCLEUS, HOLES)
    ratio, common = log_ratio(b, t, anchors(b_peak, t_peak), scale, c, HOLES)
    p_rel = (b - b_peak) * scale
    t_log = (t - t_peak) * scale - t_size
    q_log = p_rel + alpha * ratio - q_size
    drawn = common
    if HOLES:
        drawn = tl.where(to_teacher, t > float("-inf"), common)
        q_log = tl.where(drawn, tl.where(to_teacher, t_log, q_log), float("-inf"))
    return q_log, t_log, ratio, p_rel, drawn, common, cols


@triton.jit
def last_sweep(
    row, b_peak, t_peak, scale, c, p_size, t_size, q_size, alpha, to_teacher, greedy,
    R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr, HOLES: tl.constexpr, CLOSE: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """All that is reported of q, and what the draw needs of each GROUP tiles.

    Args:
        p_size, t_size, q_size: log2 of the masses that turn weights relative to the peaks into probabilities;
            an error in q_size is made good by the caller.
        HOLES: the rows may hold −inf, or q is the teacher. CLOSE: the KLs may be small.

    Returns:
        For each group Σ q, or the largest log2 q if greedy; then for the row Σ q; Σ q(p/q − 1 − log(p/q)) and the
        same for t (in nats; without CLOSE Σ q log(q/p), the same but for rounding); Σ q log2 q; Σ p²/q, Σ t²/q;
        the masses of p and t where q is 0; and the mass of q where p is 0.
    """
    mass_G = tl.zeros((GROUPS,), tl.float32)
    kl_b = tl.zeros((R,), tl.float32)
    kl_t = kl_b
    entropy = kl_b
    ess_b = kl_b
    ess_t = kl_b
    b_off = kl_b
    t_off = kl_b
    missing = kl_b
    z = tl.zeros((), tl.float64)
    excess = (q_size - p_size).to(tl.float32)  # F; the difference comes before rounding
    p_size = p_size.to(tl.float32)
    t_size = t_size.to(tl.float32)
    q_size = q_size.to(tl.float32)
    for group in range(0, row[2], GROUP * R * 8):
        q_lane = tl.zeros((R,), tl.float32)
        best = tl.full((R,), float("-inf"), tl.float32)
        for start in range(group, tl.minimum(group + GROUP * R * 8, row[2]), R * 8):
            q_log, t_log, ratio, p_rel, drawn, common, _ = log_weights(
                row, start, b_peak, t_peak, scale, c, t_size, q_size, alpha, to_teacher, R, FULL, NUCLEUS, HOLES
            )
            q = tl.exp2(q_log)
            p = tl.exp2(p_rel - p_size)
            m = tl.exp2(t_log)
            inverse = tl.exp2(tl.minimum(-q_log, 126.0))
            x = (excess - alpha * ratio) * LN2
            y = (excess + (1.0 - alpha) * ratio) * LN2
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
                kl_b += tl.sum(tl.where(tl.abs(x) < SERIES, q * x * x * curvature(x), p - q - q * x), axis=1)
                kl_t += tl.sum(tl.where(tl.abs(y) < SERIES, q * y * y * curvature(y), m - q - q * y), axis=1)
            else:
                kl_b -= tl.sum(q * x, axis=1)
                kl_t -= tl.sum(q * y, axis=1)
            ess_b += tl.sum(p * (p * inverse), axis=1)
            ess_t += tl.sum(m * (m * inverse), axis=1)
            q_lane += tl.sum(q, axis=1)
            if greedy:
                best = tl.maximum(best, tl.max(q_log, axis=1))
        value = tl.sum(q_lane)
        z += value.to(tl.float64)
        if greedy:
            value = tl.max(best)
        mass_G = tl.where(tl.arange(0, GROUPS) == group // (GROUP * R * 8), value, mass_G)
    return (
        mass_G, z, total(kl_b), total(kl_t), total(entropy), total(ess_b), total(ess_t),
        total(b_off), total(t_off), total(missing),
    )  # fmt: skip


@triton.jit
def draw(
    row, mass_G, b_peak, t_peak, scale, c, t_size, q_size, alpha, to_teacher, greedy, uniform,
    R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The drawn column and its log2 q: the inverse CDF in column order, or the most likely (docs/theory.md (17))."""
    groups_G = tl.arange(0, GROUPS)
    used = groups_G * (GROUP * R * 8) < row[2]
    goal = tl.zeros((), tl.float64)
    if greedy:
        best = tl.max(tl.where(used, mass_G, float("-inf")))
        group = tl.min(tl.where(used & (mass_G == best), groups_G, GROUPS - 1))
    else:
        wide_G = tl.where(used, mass_G, 0.0).to(tl.float64)
        until_G = tl.cumsum(wide_G, axis=0)
        goal = uniform * tl.sum(wide_G)
        last = tl.max(tl.where(wide_G > 0, groups_G, 0))
        group = tl.minimum(tl.min(tl.where(until_G > goal, groups_G, GROUPS - 1)), last)
        goal -= tl.sum(tl.where(groups_G < group, wide_G, 0.0))
    column = tl.full((), FAR, tl.int32)
    final = tl.zeros((), tl.int32)  # the last column with mass, should rounding leave the goal beyond all
    log_q = tl.full((), float("-inf"), tl.float32)
    final_log_q = log_q
    first = group * (GROUP * R * 8)
    for start in range(first, tl.minimum(first + GROUP * R * 8, row[2]), R * 8):
        q_log, _, _, _, _, _, cols = log_weights(
            row, start, b_peak, t_peak, scale, c, t_size, q_size, alpha, to_teacher, R, FULL, NUCLEUS, True
        )
        if greedy:
            top = tl.max(q_log)
            if top > log_q:
                log_q = top
                column = tl.min(tl.where(q_log == top, cols, FAR))
        else:
            q = tl.exp2(q_log).to(tl.float64)
            lane = tl.sum(q, axis=1)
            mass = tl.sum(lane)
            if (column == FAR) & (mass > 0):
                until = (tl.cumsum(lane, axis=0) - lane)[:, None] + tl.cumsum(q, axis=1)
                column = tl.min(tl.where((until > goal) & (q > 0), cols, FAR))
                final = tl.max(tl.where(q > 0, cols, 0))
                log_q = tl.sum(tl.where(cols == column, q_log, 0.0))
                final_log_q = tl.sum(tl.where(cols == final, q_log, 0.0))
            goal -= mass
    missed = column == FAR
    return tl.where(missed, final, column), tl.where(missed, final_log_q, log_q)

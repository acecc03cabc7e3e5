"""The teacher's nucleus, found by thresholds and not by sorting; knows the teacher's logits, not what is drawn."""

from __future__ import annotations

import triton
import triton.language as tl

from midlogit.decide.kernels.tiles import FAR, TEACHER, pair_tile, side_tile, total


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
    return from_order(
        tl.where(bucket >= 0, bucket << SHIFT, (bucket << SHIFT) | ((1 << SHIFT) - 1))
    )


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
    for start in range(0, row.length, R * 8):
        t, _ = side_tile(row, start, R, TEACHER, FULL)
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
    for start in range(0, row.length, R * 8):
        t, cols = side_tile(row, start, R, TEACHER, True)
        keep = (t >= floor).to(tl.int32)
        lane = tl.sum(keep, axis=1)
        found = tl.sum(lane)
        if found > 0:
            b, t, cols = pair_tile(row, start, R, True, False, True)
            place = (
                count + (tl.cumsum(lane, axis=0) - lane)[:, None] + tl.cumsum(keep, axis=1) - keep
            )
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
    for start in range(0, row.length, R * 8):
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
def find_nucleus(
    row,
    # Bracket of the threshold, the masses at or above its ends, and the mass to reach.
    low,
    low_mass,
    high,
    high_mass,
    target,
    # The teacher's largest logit, log2(e) / temperature, whether there is a stop class.
    t_peak,
    scale,
    has_stop,
    R: tl.constexpr,
    SHIFT: tl.constexpr,
    FULL: tl.constexpr,
):
    """(tau, tie) of the nucleus (docs/theory.md (15)), and the base's largest logit on it.

    Eight thresholds per sweep narrow the bracket to one value that a row can hold; most of them lie close to
    where a mass that is spread evenly over the bracket would cross the target.
    """
    i = tl.arange(0, 8).to(tl.float64)
    away = tl.abs(i - 3.5)
    side = tl.where(i < 3.5, -1.0, 1.0)
    step = 0
    while (high.to(tl.int64) - low.to(tl.int64) > 1) & (step < 64):
        width = high.to(tl.float64) - low.to(tl.float64)
        even = low.to(tl.float64) + width * (i + 1) / 9
        guess = high.to(tl.float64) - width * (target - high_mass) / tl.maximum(
            low_mass - high_mass, 1e-300
        )
        near = guess + side * tl.maximum(width * tl.exp2(2.5 * away - 10.25), away + 0.5)
        k = tl.where((width <= 9) | (step % 3 == 2), even, near)
        k = tl.minimum(tl.maximum(tl.floor(k), low.to(tl.float64) + 1), high.to(tl.float64) - 1).to(
            tl.int32
        )
        m, _ = masses_above(row, bucket_floor(k, SHIFT), t_peak, scale, R, FULL)
        low, low_mass, high, high_mass = narrow(low, low_mass, high, high_mass, k, m, target)
        step += 1

    value = bucket_value(low, SHIFT)
    left = target - high_mass
    # The stop class alone may lie between the values of a row's type: it ranks before the others of its bucket.
    before = has_stop & ((in_order(row.stop_teacher) >> SHIFT) == low) & (row.stop_teacher > value)
    left -= tl.where(before, tl.exp2((row.stop_teacher - t_peak) * scale).to(tl.float64), 0.0)
    alone = before & (left <= 0)
    tau = tl.where(alone, row.stop_teacher, value)
    each = tl.maximum(tl.exp2((value - t_peak) * scale).to(tl.float64), 1e-45)
    quota = tl.minimum(tl.maximum(tl.ceil(left / each), 1.0), 2147483647.0).to(tl.int32)
    quota = tl.where(alone, FAR, quota)
    tie, b_peak = last_tie(row, tau, quota, R, FULL)
    return tau, tie, b_peak

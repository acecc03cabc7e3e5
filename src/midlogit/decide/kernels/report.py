"""What is reported of q, and the token drawn from it; knows α and the sizes of both models, not how they were found.

A token is drawn as docs/speculation.md says: the base's draft stands, or one of (q − D)₊ replaces it. The KLs are sums
of terms that are never negative.
"""

from __future__ import annotations

import triton
import triton.language as tl

from midlogit.decide.kernels.moments import SERIES, anchors, curvature, log_ratio
from midlogit.decide.kernels.tiles import FAR, LN2, column_at, columns, group_at, pair_tile, total


@triton.jit
def weigh(b, t, b_peak, t_peak, scale, c, t_size, q_size, alpha, to_teacher, HOLES: tl.constexpr):
    """log2 of q and of the teacher, ℓ, log2 of the base relative to its peak; the drawable, the common."""
    ratio, common = log_ratio(b, t, anchors(b_peak, t_peak), scale, c, HOLES)
    p_rel = (b - b_peak) * scale
    t_log = (t - t_peak) * scale - t_size
    q_log = p_rel + alpha * ratio - q_size
    drawn = common
    if HOLES:
        drawn = tl.where(to_teacher, t > float("-inf"), common)
        q_log = tl.where(drawn, tl.where(to_teacher, t_log, q_log), float("-inf"))
    return q_log, t_log, ratio, p_rel, drawn, common


@triton.jit
def last_sweep(
    row, b_peak, t_peak, scale, c, share, p_size, t_size, q_size, alpha, to_teacher, greedy,
    R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr, HOLES: tl.constexpr, CLOSE: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """All that is reported of q, and what the draw needs of each GROUP tiles.

    Args:
        share: D's mass on the support, so that D is p times that.
        p_size, t_size, q_size: log2 of the masses that turn weights relative to the peaks into probabilities;
            an error in q_size is made good by the caller.
        HOLES: the rows may hold −inf, or q is the teacher. CLOSE: the KLs may be small.

    Returns:
        For each group Σ q, or the largest log2 q if greedy, and Σ (q − D)₊; then for the row Σ q; Σ q(p/q − 1 −
        log(p/q)) and the same for t (in nats; without CLOSE Σ q log(q/p), the same but for rounding); Σ q log2 q;
        Σ p²/q, Σ t²/q; the masses of p and t where q is 0; and the mass of q where p is 0.
    """
    mass_G = tl.zeros((GROUPS,), tl.float32)
    rest_G = mass_G
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
        rest = q_lane
        best = tl.full((R,), float("-inf"), tl.float32)
        for start in range(group, tl.minimum(group + GROUP * R * 8, row[2]), R * 8):
            b, t, _ = pair_tile(row, start, R, FULL, NUCLEUS, HOLES)
            q_log, t_log, ratio, p_rel, drawn, common = weigh(
                b, t, b_peak, t_peak, scale, c, t_size, q_size, alpha, to_teacher, HOLES
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
            rest += tl.sum(tl.maximum(q - share * p, 0.0), axis=1)
            if greedy:
                best = tl.maximum(best, tl.max(q_log, axis=1))
        value = tl.sum(q_lane)
        z += value.to(tl.float64)
        if greedy:
            value = tl.max(best)
        mine = tl.arange(0, GROUPS) == group // (GROUP * R * 8)
        mass_G = tl.where(mine, value, mass_G)
        rest_G = tl.where(mine, tl.sum(rest), rest_G)
    return (
        mass_G, rest_G, z, total(kl_b), total(kl_t), total(entropy), total(ess_b), total(ess_t),
        total(b_off), total(t_off), total(missing),
    )  # fmt: skip


@triton.jit
def find_draft(row, ids, drafted, R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr):
    """The column of the drafted outcome and both effective logits there; −inf off the support."""
    column = drafted
    if not FULL:
        column = tl.full((), FAR, tl.int32)
        for start in range(0, row[2], R * 8):
            cols = columns(start, R)
            found = tl.load(ids + cols, mask=cols < row[2], other=-1)
            column = tl.minimum(column, tl.min(tl.where(found == drafted, cols, FAR)))
    kept = column < row[2]
    column = tl.where(kept, column, 0)
    stop = column == row[5]
    b = tl.where(stop, row[6], tl.load(row[0] + column).to(tl.float32))
    t = tl.where(stop, row[7], tl.load(row[1] + column).to(tl.float32))
    if NUCLEUS:
        kept = kept & ((t > row[8]) | ((t == row[8]) & (column <= row[9])))
    return column, tl.where(kept, b, float("-inf")), tl.where(kept, t, float("-inf"))


@triton.jit
def draw(
    row, mass_G, b_peak, t_peak, scale, c, share, p_size, t_size, q_size, alpha, to_teacher, greedy, uniform,
    R: tl.constexpr, FULL: tl.constexpr, NUCLEUS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A column and its log2 q: the most likely, or the inverse CDF of (q − D)₊ in column order.

    Args:
        mass_G: of each group the largest log2 q if greedy, else the mass. share: D is p times that; 0 draws from q.
    """
    SPAN: tl.constexpr = GROUP * R * 8
    groups_G = tl.arange(0, GROUPS)
    if greedy:
        used = groups_G * SPAN < row[2]
        best = tl.max(tl.where(used, mass_G, float("-inf")))
        group = tl.min(tl.where(used & (mass_G == best), groups_G, GROUPS - 1))
        goal = tl.zeros((), tl.float64)
    else:
        group, goal = group_at(mass_G.to(tl.float64), uniform, GROUPS)
    column = tl.full((), FAR, tl.int32)
    final = tl.zeros((), tl.int32)  # the last column with mass, should rounding leave the goal beyond all
    log_q = tl.full((), float("-inf"), tl.float32)
    final_log_q = log_q
    p_size = p_size.to(tl.float32)
    for start in range(group * SPAN, tl.minimum((group + 1) * SPAN, row[2]), R * 8):
        b, t, cols = pair_tile(row, start, R, FULL, NUCLEUS, True)
        q_log, _, _, p_rel, _, _ = weigh(b, t, b_peak, t_peak, scale, c, t_size, q_size, alpha, to_teacher, True)
        if greedy:
            top = tl.max(q_log)
            if top > log_q:
                log_q = top
                column = tl.min(tl.where(q_log == top, cols, FAR))
        elif column == FAR:
            rest = tl.maximum(tl.exp2(q_log) - share * tl.exp2(p_rel - p_size), 0.0).to(tl.float64)
            lane = tl.sum(rest, axis=1)
            mass = tl.sum(lane)
            if mass > 0:
                column, final = column_at(rest, lane, cols, goal)
                log_q = tl.sum(tl.where(cols == column, q_log, 0.0))
                final_log_q = tl.sum(tl.where(cols == final, q_log, 0.0))
            goal -= mass
    missed = column == FAR
    return tl.where(missed, final, column), tl.where(missed, final_log_q, log_q)

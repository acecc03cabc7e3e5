"""The kernel that finds α and q of a row pair and draws, one program a decision; knows settings and rules.

It runs on the rows as they are, or on the candidates of a nucleus that survey.py copied; it is the same code for both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from midlogit.decide.kernels.draft import DRAFTS, SETTINGS
from midlogit.decide.kernels.moments import close_moments, landmarks, moments
from midlogit.decide.kernels.nucleus import find_nucleus, last_tie
from midlogit.decide.kernels.report import draw, find_draft, last_sweep, weigh
from midlogit.decide.kernels.teacher_scan import STATE
from midlogit.decide.kernels.tiles import FAR, LN2, LOWEST, NOTHING

# token, alpha, both KLs, entropy, both effective sizes, logprobs under q, base and teacher, fallback, error, draft
RESULTS = tl.constexpr(13)  # columns, float64, one row a decision

EQUAL_KL = tl.constexpr(0)
FIXED_ALPHA = tl.constexpr(1)
KL_BUDGET = tl.constexpr(2)

BROKEN = tl.constexpr(1)
EMPTY = tl.constexpr(2)

CLOSE = tl.constexpr(50.0)  # E|ℓ| / Var ℓ beyond which float32 sums of signed terms say too little of F′
STEPS = tl.constexpr(80)
ROUNDING = tl.constexpr(2.0**-30)  # of |F′| at temperature 1 (core/mixture.py: rounding)
SMALL_KL = tl.constexpr(0.02)  # below it the KLs are summed from terms that are never negative


@triton.jit
def log1p(x):
    """log(1 + x) of a float64 scalar, exact for small x."""
    u = 1.0 + x
    near = tl.where(u == 1.0, 1.0, u - 1.0)
    return tl.where(u == 1.0, x, tl.log(tl.maximum(u, 1e-300)) * (x / near))


@triton.jit
def first_alpha(f0, fh, f1, s0, sh, s1, area_low, area_high, use_area):
    """The root of a quartic through values, slopes and (for F′) the area at 0, ½ and 1."""
    left = fh >= 0
    a = tl.where(left, f0, fh)
    b = tl.where(left, fh, f1)
    da = 0.5 * tl.where(left, s0, sh)
    db = 0.5 * tl.where(left, sh, s1)
    area = 2 * tl.where(left, area_low, area_high)
    bulge = tl.where(use_area, 30 * (area - 0.5 * (a + b) - (da - db) / 12), 0.0)
    x = 0.5
    width = 0.25
    for _ in range(14):
        y = 1 - x
        f = a * (1 + 2 * x) * y * y + da * x * y * y + b * x * x * (3 - 2 * x) - db * x * x * y + bulge * x * x * y * y
        x = tl.where(f > 0, x - width, x + width)
        width = 0.5 * width
    return tl.where(left, 0.0, 0.5) + 0.5 * x


@triton.jit
def solve_kernel(
    base, base_stride, teacher, teacher_stride, length, vocabulary, ids, settings, hidden, hidden_stride, dirty,
    dirty_stride, stops, drafts, state, results, tokens,
    R: tl.constexpr, STOPS: tl.constexpr, SHIFT: tl.constexpr, NUCLEUS: tl.constexpr, FULL: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    s = settings + n * SETTINGS
    base_row = tl.load(s).to(tl.int64)
    drafted = drafts + base_row * DRAFTS
    known = state + n * STATE
    out = results + n * RESULTS
    count = tl.load(known + 5).to(tl.int32)
    if FULL:
        if count >= 0:
            return
        base += base_row * base_stride
        teacher += tl.load(s + 1).to(tl.int64) * teacher_stride
    else:
        if count < 0:
            return
        base += n.to(tl.int64) * base_stride
        teacher += n.to(tl.int64) * teacher_stride
        ids += n.to(tl.int64) * base_stride
        length = count

    alphabet = tl.load(s + 2).to(tl.int32)
    inv_t = tl.load(s + 3)
    scale = (inv_t / LN2).to(tl.float32)
    greedy = tl.load(s + 4) != 0
    top_p = tl.load(s + 5)
    tolerance = tl.load(s + 6)
    rule = tl.load(s + 7).to(tl.int32)
    value = tl.load(s + 8)
    forced = tl.load(s + 9) != 0
    stop_at = tl.load(stops + alphabet * STOPS)
    draft = tl.load(drafted).to(tl.int32)
    d_peak = tl.load(drafted + 1)
    base_lse = tl.load(drafted + 3)
    stop_base = tl.load(drafted + 5).to(tl.float32)
    teacher_lse = tl.load(known)
    t_peak = tl.load(known + 1).to(tl.float32)
    stop_teacher = tl.load(known + 2).to(tl.float32)
    lowest = tl.minimum(tl.load(drafted + 4), tl.load(known + 11))
    lowest = tl.minimum(lowest, tl.where(stop_at >= 0, tl.minimum(stop_base, stop_teacher), 0.0))
    general = forced | (lowest == float("-inf"))
    b_peak = d_peak.to(tl.float32)

    broken = ~((tl.abs(base_lse) < float("inf")) & (tl.abs(teacher_lse) < float("inf")))
    if broken | (t_peak == float("-inf")):
        tl.store(tokens + n, 0)
        for i in range(11):
            tl.store(out + i, 0.0)
        tl.store(out + 11, tl.where(broken, BROKEN, EMPTY).to(tl.float64))
        tl.store(out + 12, draft.to(tl.float64))
        return

    tau = tl.full((), float("-inf"), tl.float32)
    tie = tl.full((), FAR, tl.int32)
    whole = (
        base, teacher, length, hidden + alphabet * hidden_stride, dirty + alphabet * dirty_stride,
        tl.where(FULL, stop_at, -1), stop_base, stop_teacher, tau, tie,
    )  # fmt: skip
    if NUCLEUS:
        if top_p < 1.0:
            low = tl.load(known + 6).to(tl.int32) >> SHIFT
            high = tl.load(known + 7).to(tl.int32) >> SHIFT
            low_mass = tl.load(known + 8)
            high_mass = tl.load(known + 9)
            target = tl.load(known + 10)
            tau, tie, b_peak = find_nucleus(
                whole, low, low_mass, high, high_mass, target, t_peak, scale, stop_at >= 0, R, SHIFT, FULL
            )
        elif top_p <= 1.0:
            tau = tl.full((), LOWEST, tl.float32)
            _, b_peak = last_tie(whole, tau, 1, R, FULL)
            tie = tl.full((), FAR, tl.int32)
    row = (whole[0], whole[1], length, whole[3], whole[4], whole[5], stop_base, stop_teacher, tau, tie)
    to_teacher = forced | (b_peak == float("-inf"))
    b_peak = tl.where(b_peak == float("-inf"), 0.0, b_peak)

    if general:
        p0, p1, p2, w0, w1, w2, t0, t1, t2, p_off, t_off, gap, size = landmarks(
            row, b_peak, t_peak, scale, R, FULL, NUCLEUS, True
        )
    else:
        p0, p1, p2, w0, w1, w2, t0, t1, t2, p_off, t_off, gap, size = landmarks(
            row, b_peak, t_peak, scale, R, FULL, NUCLEUS, False
        )
    p_mass = tl.maximum(p0 + p_off, 1e-300)
    t_mass = t0 + t_off
    close = tl.abs(t_mass - p_mass) < 0.5 * p_mass
    c = tl.where(close, log1p(tl.where(close, gap + t_off - p_off, 0.0) / p_mass), tl.log(t_mass / p_mass))
    c2 = (c / LN2).to(tl.float32)
    log_p = tl.log(p_mass)

    # What α is, or where to look for it.
    rough = tl.minimum(tl.minimum(p0, t0), w0) < 1e-24
    p0 = tl.maximum(p0, 1e-100)
    w0 = tl.maximum(w0, 1e-100)
    t0 = tl.maximum(t0, 1e-100)
    holes = (p_off > 0) | (t_off > 0)
    budget = rule == KL_BUDGET
    F0 = tl.log(p0 / p_mass)
    Fh = tl.log(w0 / p_mass) - 0.5 * c
    F1 = tl.log(t0 / t_mass)
    m0 = p1 / p0 * LN2 - c
    mh = w1 / w0 * LN2 - c
    m1 = t1 / t0 * LN2 - c
    v0 = (p2 / p0 - (p1 / p0) * (p1 / p0)) * LN2 * LN2
    vh = (w2 / w0 - (w1 / w0) * (w1 / w0)) * LN2 * LN2
    v1 = (t2 / t0 - (t1 / t0) * (t1 / t0)) * LN2 * LN2
    f0 = tl.where(budget, -F0 - value, m0)
    fh = tl.where(budget, 0.5 * mh - Fh - value, mh)
    f1 = tl.where(budget, m1 - F1 - value, m1)
    alpha = first_alpha(
        f0, fh, f1, tl.where(budget, 0.0, v0), tl.where(budget, 0.5 * vh, vh), v1, Fh - F0, F1 - Fh, ~budget
    )
    near = (m1 - m0 < 0.01) & (size / w0 * LN2 + tl.abs(c) > CLOSE * vh) & ~holes & ~rough
    alpha = tl.where(near & ~budget, 0.5, alpha)
    # Where both have the same support, F′ is negative at 0 and positive at 1 whatever float32 makes of it.
    ends = (holes | budget) & ~rough
    nothing = ROUNDING * inv_t * inv_t  # |F′| that rounding alone may make of equal models
    flat = (tl.abs(f0) <= nothing) & (tl.abs(f1) <= nothing) & (vh <= 2 * nothing) & ~rough
    settled = flat | (ends & ((f0 >= 0) | (f1 <= 0))) | (rule == FIXED_ALPHA)
    alpha = tl.where(ends & (f1 <= 0), 1.0, alpha)
    alpha = tl.where(ends & (f0 >= 0), 0.0, alpha)
    alpha = tl.where(flat, 0.5, alpha)
    alpha = tl.where(rule == FIXED_ALPHA, value, alpha)
    # Rough rows look at 0 (stage 0) and at 1 (stage 1) first; stage 3 takes α as it is.
    stage = tl.where(settled, 3, tl.where(rough, 0, 2))
    alpha = tl.where(stage == 0, 0.0, alpha)

    done = to_teacher
    q_size = tl.full((), 0.0, tl.float64)  # log2 of the mass of the weights at α
    gradient = tl.full((), 0.0, tl.float64)  # F′(α)
    lo = tl.full((), 0.0, tl.float64)
    hi = tl.full((), 1.0, tl.float64)
    steps = 0
    while (~done) & (steps < STEPS):
        alpha = alpha.to(tl.float32).to(tl.float64)
        if near:
            n0, n1, h1, ha, a1, a2 = close_moments(row, b_peak, t_peak, scale, alpha.to(tl.float32), R, FULL, NUCLEUS)
            n1 = n1 / n0
            weight = 1 + alpha * n1 + ha / n0
            shift = log1p(n1 + h1 / n0)
            first = (n1 + a1 / n0) / weight
            second = a2 / n0 / weight - first * first
            third = second * 0.0
            first -= shift
            F = log1p(alpha * n1 + ha / n0) - alpha * shift
            q_size = (F + log_p) / LN2
        else:
            if general:
                q_size, e1, e2, e3 = moments(
                    row, b_peak, t_peak, scale, c2, alpha.to(tl.float32), R, FULL, NUCLEUS, True
                )
            else:
                q_size, e1, e2, e3 = moments(
                    row, b_peak, t_peak, scale, c2, alpha.to(tl.float32), R, FULL, NUCLEUS, False
                )
            first = e1 * LN2
            second = (e2 - e1 * e1) * (LN2 * LN2)
            third = (e3 - 3 * e1 * e2 + 2 * e1 * e1 * e1) * (LN2 * LN2 * LN2)
            F = q_size * LN2 - log_p
        if q_size <= 0.5 * NOTHING:  # no common support after all
            to_teacher = to_teacher | True
            done = done | True
        second = tl.maximum(second, 0.0)
        f = tl.where(budget, alpha * first - F - value, first)
        slope = tl.where(budget, alpha * second, second)
        bend = tl.where(budget, second + alpha * third, third)
        floor = tl.where(near, 1e-6 * slope, tl.where(budget, 2e-7, 1e-8 * tl.sqrt(second)))
        at_root = tl.abs(f) <= tl.maximum(tolerance * tl.minimum(slope, 1.0), floor)
        at_end = ((stage == 0) & (f >= 0)) | ((stage == 1) & (f <= 0))
        # A row that nearly agrees begins at ½, and stays there where its variance is that of rounding.
        equal = near & ~budget & (steps == 0) & (second <= 2 * nothing)
        done = done | (stage == 3) | at_end | equal | ((stage == 2) & (at_root | (hi - lo <= 6e-8)))

        lo = tl.where((stage == 2) & (f < 0), alpha, lo)
        hi = tl.where((stage == 2) & (f > 0), alpha, hi)
        safe = tl.where(slope > 0, slope, 1.0)
        newton = -f / safe
        curve = 1 + 0.5 * newton * bend / safe  # Halley's correction
        delta = tl.where(curve > 0.5, newton / tl.maximum(curve, 0.5), newton)
        guess = alpha + delta
        inside = (slope > 0) & (guess > lo) & (guess < hi) & ((steps < 12) | (steps % 2 == 0))
        # The error of a Halley step is of third order: below the tolerance it needs no look at the rows.
        reach = tl.abs(delta) * (1 + tl.abs(bend) / safe + 2 * tl.sqrt(second))
        jump = (
            (stage == 2) & inside & (tl.abs(delta) * reach * reach * tl.maximum(slope, 1.0) <= 0.1 * tolerance) & ~done
        )
        step = guess.to(tl.float32).to(tl.float64) - alpha
        ahead = first * step + 0.5 * second * step * step + third * step * step * step / 6
        q_size = tl.where(jump, q_size + ahead / LN2, q_size)
        gradient = tl.where(jump, first + second * step, first)
        moved = tl.where(stage == 2, tl.where(inside, guess, 0.5 * (lo + hi)), tl.where(stage == 0, 1.0, 0.5))
        alpha = tl.where(done | (steps == STEPS - 1), alpha, moved)
        done = done | jump
        stage = tl.where((stage == 0) | (stage == 1), stage + 1, stage)
        steps += 1
    alpha = tl.where(to_teacher, 1.0, alpha.to(tl.float32).to(tl.float64))

    p_size = log_p / LN2
    q_size = tl.where(to_teacher, p_size, q_size)
    t_size = tl.log(t_mass) / LN2
    alpha32 = alpha.to(tl.float32)
    # D is p times its mass on the support; nothing of p is left where the base drafts nothing.
    d_size = tl.load(drafted + 2) + tl.where(d_peak > float("-inf"), d_peak - b_peak, 0.0) * scale
    share = tl.exp2(tl.minimum(p_size - d_size, 0.0)).to(tl.float32)
    if general:
        mass_G, rest_G, z, kl_b, kl_t, entropy, ess_b, ess_t, b_off, t_off, missing = last_sweep(
            row, b_peak, t_peak, scale, c2, share, p_size, t_size, q_size, alpha32, to_teacher, greedy,
            R, FULL, NUCLEUS, True, True, GROUP, GROUPS,
        )  # fmt: skip
    elif tl.minimum(alpha * gradient, (alpha - 1) * gradient) - (q_size - p_size) * LN2 < SMALL_KL:  # (6)
        mass_G, rest_G, z, kl_b, kl_t, entropy, ess_b, ess_t, b_off, t_off, missing = last_sweep(
            row, b_peak, t_peak, scale, c2, share, p_size, t_size, q_size, alpha32, to_teacher, greedy,
            R, FULL, NUCLEUS, False, True, GROUP, GROUPS,
        )  # fmt: skip
    else:
        mass_G, rest_G, z, kl_b, kl_t, entropy, ess_b, ess_t, b_off, t_off, missing = last_sweep(
            row, b_peak, t_peak, scale, c2, share, p_size, t_size, q_size, alpha32, to_teacher, greedy,
            R, FULL, NUCLEUS, False, False, GROUP, GROUPS,
        )  # fmt: skip
    t_size = t_size.to(tl.float32)
    q_size = q_size.to(tl.float32)
    column, b, t = find_draft(row, ids, draft, R, FULL, NUCLEUS)
    q_log, _, _, p_rel, _, _ = weigh(b, t, b_peak, t_peak, scale, c2, t_size, q_size, alpha32, to_teacher, True)
    drawn_mass = share * tl.exp2(p_rel - p_size.to(tl.float32))
    stands = (d_peak > float("-inf")) & (tl.load(s + 11) * drawn_mass * z < tl.exp2(q_log))
    if greedy | ~stands:
        some = tl.sum(rest_G) > 0  # else rounding left nothing of it, and q itself is drawn from
        mass_G = tl.where(greedy | ~some, mass_G, rest_G)
        share = tl.where(some, share, 0.0)
        column, q_log = draw(
            row, mass_G, b_peak, t_peak, scale, c2, share, p_size, t_size, q_size, alpha32, to_teacher, greedy,
            tl.load(s + 12), R, FULL, NUCLEUS, GROUP, GROUPS,
        )  # fmt: skip
    log_z = tl.log(z)
    token = column
    if not FULL:
        token = tl.load(ids + column)
    stopped = token == stop_at
    raw_base = tl.load(base + column).to(tl.float64)
    raw_teacher = tl.load(teacher + column).to(tl.float64)
    raw_base = tl.where(stopped, tl.load(drafted + 6), raw_base) - base_lse
    raw_teacher = tl.where(stopped, tl.load(known + 3), raw_teacher) - teacher_lse
    token = tl.where(stopped, tl.load(known + 4).to(tl.int32), token)
    # What the models read next is an id that both have.
    tl.store(tokens + n, tl.where(stopped & (token >= vocabulary), stop_at, token).to(tl.int64))
    tl.store(out, token.to(tl.float64))
    tl.store(out + 1, alpha)
    tl.store(out + 2, tl.where(missing > 0, float("inf"), kl_b / z + b_off))
    tl.store(out + 3, kl_t / z + t_off)
    tl.store(out + 4, log_z - entropy * LN2 / z)
    tl.store(out + 5, 1 / (z * ess_b))
    tl.store(out + 6, 1 / (z * ess_t))
    tl.store(out + 7, q_log.to(tl.float64) * LN2 - log_z)
    tl.store(out + 8, raw_base)
    tl.store(out + 9, raw_teacher)
    tl.store(out + 10, (to_teacher & ~forced).to(tl.float64))
    tl.store(out + 11, 0.0)
    tl.store(out + 12, draft.to(tl.float64))

"""The search for α of a row pair; knows rules and sums over the pair, not what is reported or drawn.

Everything per row is float64, but α is always a float32 number, since weights are computed from it in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from midlogit.decide.kernels.layout import FIXED_ALPHA
from midlogit.decide.kernels.moments import close_moments, moments
from midlogit.decide.kernels.tiles import LN2, NOTHING

CLOSE = tl.constexpr(
    50.0
)  # E|ℓ| / Var ℓ beyond which float32 sums of signed terms say too little of F′
STEPS = tl.constexpr(80)
ROUNDING = tl.constexpr(2.0**-30)  # of |F′| at temperature 1 (core/mixture.py: rounding)

# Stages of the search. Rough rows, whose weights underflow at ½, look at both ends first.
AT_ZERO = tl.constexpr(0)
AT_ONE = tl.constexpr(1)
SEARCH = tl.constexpr(2)
SETTLED = tl.constexpr(3)  # α is taken as it is


class Rule(NamedTuple):
    """How α is chosen.

    Attributes:
        code, parameter: of the AlphaRule. budget: whether it is KL_BUDGET.
        tolerance: of α.
        rounding: |F′| that rounding alone may make of equal models.
    """

    code: Any
    parameter: Any
    budget: Any
    tolerance: Any
    rounding: Any


class Masses(NamedTuple):
    """Masses of both models on the support, relative to their peaks.

    Attributes:
        p, t: the masses. log_p: log p.
        c: log (t / p), ℓ's normaliser.
    """

    p: Any
    t: Any
    log_p: Any
    c: Any


class Guess(NamedTuple):
    """Where the search begins.

    Attributes:
        alpha: α, if `stage` is SETTLED, else a guess.
        stage: of the search.
        near: whether the rows nearly agree, so that only sums of terms of the result's size are exact enough.
    """

    alpha: Any
    stage: Any
    near: Any


@triton.jit
def log1p(x):
    """log(1 + x) of a float64 scalar, exact for small x."""
    u = 1.0 + x
    near = tl.where(u == 1.0, 1.0, u - 1.0)
    return tl.where(u == 1.0, x, tl.log(tl.maximum(u, 1e-300)) * (x / near))


@triton.jit
def masses(sums):
    """The Masses from Landmarks; c without cancellation where the rows agree."""
    p = tl.maximum(sums.p0 + sums.p_off, 1e-300)
    t = sums.t0 + sums.t_off
    close = tl.abs(t - p) < 0.5 * p
    difference = sums.gap + sums.t_off - sums.p_off
    c = tl.where(close, log1p(tl.where(close, difference, 0.0) / p), tl.log(t / p))
    return Masses(p=p, t=t, log_p=tl.log(p), c=c)


@triton.jit
def quartic_root(f0, fh, f1, s0, sh, s1, area_low, area_high, use_area):
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
        f = (
            a * (1 + 2 * x) * y * y
            + da * x * y * y
            + b * x * x * (3 - 2 * x)
            - db * x * x * y
            + bulge * x * x * y * y
        )
        x = tl.where(f > 0, x - width, x + width)
        width = 0.5 * width
    return tl.where(left, 0.0, 0.5) + 0.5 * x


@triton.jit
def first_guess(sums, mass, rule):
    """The Guess from Landmarks and Masses."""
    rough = tl.minimum(tl.minimum(sums.p0, sums.t0), sums.w0) < 1e-24
    p0 = tl.maximum(sums.p0, 1e-100)
    w0 = tl.maximum(sums.w0, 1e-100)
    t0 = tl.maximum(sums.t0, 1e-100)
    holes = (sums.p_off > 0) | (sums.t_off > 0)

    # F, F′ and F″ at 0, ½ (h) and 1, and with them the rule's function.
    F0 = tl.log(p0 / mass.p)
    Fh = tl.log(w0 / mass.p) - 0.5 * mass.c
    F1 = tl.log(t0 / mass.t)
    m0 = sums.p1 / p0 * LN2 - mass.c
    mh = sums.w1 / w0 * LN2 - mass.c
    m1 = sums.t1 / t0 * LN2 - mass.c
    v0 = (sums.p2 / p0 - (sums.p1 / p0) * (sums.p1 / p0)) * LN2 * LN2
    vh = (sums.w2 / w0 - (sums.w1 / w0) * (sums.w1 / w0)) * LN2 * LN2
    v1 = (sums.t2 / t0 - (sums.t1 / t0) * (sums.t1 / t0)) * LN2 * LN2
    f0 = tl.where(rule.budget, -F0 - rule.parameter, m0)
    fh = tl.where(rule.budget, 0.5 * mh - Fh - rule.parameter, mh)
    f1 = tl.where(rule.budget, m1 - F1 - rule.parameter, m1)
    s0 = tl.where(rule.budget, 0.0, v0)
    sh = tl.where(rule.budget, 0.5 * vh, vh)
    alpha = quartic_root(f0, fh, f1, s0, sh, v1, Fh - F0, F1 - Fh, ~rule.budget)

    near = (m1 - m0 < 0.01) & (sums.size / w0 * LN2 + tl.abs(mass.c) > CLOSE * vh) & ~holes & ~rough
    alpha = tl.where(near & ~rule.budget, 0.5, alpha)

    # Where both have the same support, F′ is negative at 0 and positive at 1 whatever float32 makes of it.
    ends = (holes | rule.budget) & ~rough
    flat = (
        (tl.abs(f0) <= rule.rounding)
        & (tl.abs(f1) <= rule.rounding)
        & (vh <= 2 * rule.rounding)
        & ~rough
    )
    settled = flat | (ends & ((f0 >= 0) | (f1 <= 0))) | (rule.code == FIXED_ALPHA)
    alpha = tl.where(ends & (f1 <= 0), 1.0, alpha)
    alpha = tl.where(ends & (f0 >= 0), 0.0, alpha)
    alpha = tl.where(flat, 0.5, alpha)
    alpha = tl.where(rule.code == FIXED_ALPHA, rule.parameter, alpha)

    stage = tl.where(settled, SETTLED, tl.where(rough, AT_ZERO, SEARCH))
    alpha = tl.where(stage == AT_ZERO, 0.0, alpha)
    return Guess(alpha=alpha, stage=stage, near=near)


@triton.jit
def newton(
    # The pair, both peaks, log2(e) / temperature, Masses, whether it may hold −inf.
    row,
    b_peak,
    t_peak,
    scale,
    mass,
    general,
    # The search: a Rule, a Guess, and whether there is nothing to search, since q is the teacher.
    rule,
    guess,
    to_teacher,
    R: tl.constexpr,
    FULL: tl.constexpr,
    NUCLEUS: tl.constexpr,
):
    """Safeguarded steps of Halley's method from a guess.

    Returns:
        α; log2 of the mass of the weights at α; F′(α); whether q is the teacher, which it also is where there turns
        out to be no common support.
    """
    c_log2 = (mass.c / LN2).to(tl.float32)
    alpha = guess.alpha
    stage = guess.stage
    done = to_teacher
    q_size = tl.full((), 0.0, tl.float64)  # log2 of the mass of the weights at α
    gradient = tl.full((), 0.0, tl.float64)  # F′(α)
    lo = tl.full((), 0.0, tl.float64)
    hi = tl.full((), 1.0, tl.float64)
    steps = 0
    while (~done) & (steps < STEPS):
        # F and its derivatives at α.
        alpha = alpha.to(tl.float32).to(tl.float64)
        if guess.near:
            n0, n1, h1, ha, a1, a2 = close_moments(
                row, b_peak, t_peak, scale, alpha.to(tl.float32), R, FULL, NUCLEUS
            )
            n1 = n1 / n0
            weight = 1 + alpha * n1 + ha / n0
            shift = log1p(n1 + h1 / n0)
            first = (n1 + a1 / n0) / weight
            second = a2 / n0 / weight - first * first
            third = second * 0.0
            first -= shift
            F = log1p(alpha * n1 + ha / n0) - alpha * shift
            q_size = (F + mass.log_p) / LN2
        else:
            if general:
                q_size, e1, e2, e3 = moments(
                    row, b_peak, t_peak, scale, c_log2, alpha.to(tl.float32), R, FULL, NUCLEUS, True
                )
            else:
                q_size, e1, e2, e3 = moments(
                    row,
                    b_peak,
                    t_peak,
                    scale,
                    c_log2,
                    alpha.to(tl.float32),
                    R,
                    FULL,
                    NUCLEUS,
                    False,
                )
            first = e1 * LN2
            second = (e2 - e1 * e1) * (LN2 * LN2)
            third = (e3 - 3 * e1 * e2 + 2 * e1 * e1 * e1) * (LN2 * LN2 * LN2)
            F = q_size * LN2 - mass.log_p
        if q_size <= 0.5 * NOTHING:  # no common support after all
            to_teacher = to_teacher | True
            done = done | True

        # The rule's function, and whether α is its root.
        second = tl.maximum(second, 0.0)
        f = tl.where(rule.budget, alpha * first - F - rule.parameter, first)
        slope = tl.where(rule.budget, alpha * second, second)
        bend = tl.where(rule.budget, second + alpha * third, third)
        floor = tl.where(
            guess.near, 1e-6 * slope, tl.where(rule.budget, 2e-7, 1e-8 * tl.sqrt(second))
        )
        at_root = tl.abs(f) <= tl.maximum(rule.tolerance * tl.minimum(slope, 1.0), floor)
        at_end = ((stage == AT_ZERO) & (f >= 0)) | ((stage == AT_ONE) & (f <= 0))
        # A row that nearly agrees begins at ½, and stays there where its variance is that of rounding.
        equal = guess.near & ~rule.budget & (steps == 0) & (second <= 2 * rule.rounding)
        done = (
            done
            | (stage == SETTLED)
            | at_end
            | equal
            | ((stage == SEARCH) & (at_root | (hi - lo <= 6e-8)))
        )

        # The next α: a Halley step, or the middle of the bracket.
        lo = tl.where((stage == SEARCH) & (f < 0), alpha, lo)
        hi = tl.where((stage == SEARCH) & (f > 0), alpha, hi)
        safe = tl.where(slope > 0, slope, 1.0)
        straight = -f / safe
        curve = 1 + 0.5 * straight * bend / safe  # Halley's correction
        delta = tl.where(curve > 0.5, straight / tl.maximum(curve, 0.5), straight)
        target = alpha + delta
        inside = (slope > 0) & (target > lo) & (target < hi) & ((steps < 12) | (steps % 2 == 0))

        # The error of a Halley step is of third order: below the tolerance it needs no look at the rows.
        reach = tl.abs(delta) * (1 + tl.abs(bend) / safe + 2 * tl.sqrt(second))
        exact = tl.abs(delta) * reach * reach * tl.maximum(slope, 1.0) <= 0.1 * rule.tolerance
        jump = (stage == SEARCH) & inside & exact & ~done
        step = target.to(tl.float32).to(tl.float64) - alpha
        ahead = first * step + 0.5 * second * step * step + third * step * step * step / 6
        q_size = tl.where(jump, q_size + ahead / LN2, q_size)
        gradient = tl.where(jump, first + second * step, first)

        moved = tl.where(
            stage == SEARCH,
            tl.where(inside, target, 0.5 * (lo + hi)),
            tl.where(stage == AT_ZERO, 1.0, 0.5),
        )
        alpha = tl.where(done | (steps == STEPS - 1), alpha, moved)
        done = done | jump
        stage = tl.where((stage == AT_ZERO) | (stage == AT_ONE), stage + 1, stage)
        steps += 1
    alpha = tl.where(to_teacher, 1.0, alpha.to(tl.float32).to(tl.float64))
    return alpha, q_size, gradient, to_teacher

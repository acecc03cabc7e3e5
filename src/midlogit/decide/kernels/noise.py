"""Gumbel noise in kernels, the same as `core.noise` makes; knows no rows."""

from __future__ import annotations

import triton
import triton.language as tl

from midlogit.core import noise

FIRST_BLOCK = tl.constexpr(noise.FIRST_BLOCK)
STEP = tl.constexpr(noise.STEP)
FACTOR_1, FACTOR_2 = tl.constexpr(noise.FACTOR_1), tl.constexpr(noise.FACTOR_2)
SHIFT_1, SHIFT_2, SHIFT_3 = map(tl.constexpr, (noise.SHIFT_1, noise.SHIFT_2, noise.SHIFT_3))
SEEDS = tl.constexpr(float(noise.SEEDS))
DROPPED_BITS = tl.constexpr(noise.DROPPED_BITS)
SPACING = tl.constexpr(noise.SPACING)


@triton.jit
def arrivals(mass, numbers, uniform):
    """Exponential noise per mass, whose least is the largest log mass plus Gumbel noise; ∞ where there is no mass.

    Args:
        mass: float64. numbers: of the outcomes, as `core.noise` counts them. uniform: of the position.
    """
    word = (uniform * SEEDS).to(tl.uint64) + (numbers.to(tl.uint64) + 1) * STEP
    word = (word ^ (word >> SHIFT_1)) * FACTOR_1
    word = (word ^ (word >> SHIFT_2)) * FACTOR_2
    word = word ^ (word >> SHIFT_3)
    exponential = -tl.log(((word >> DROPPED_BITS).to(tl.float64) + 0.5) * SPACING)
    return tl.where(mass > 0, exponential / tl.where(mass > 0, mass, 1.0), float("inf"))

"""Exponential noise of numbered outcomes at one position, hashed from a uniform of it; knows no masses.

SplitMix64 (Steele, Lea and Flood 2014; docs/theory.md (17)): its n-th output is a function of n and of where it
started, so the noise of one outcome is found without that of the others.
"""

from __future__ import annotations

import math

from midlogit.core.arrays import Array, array_namespace, float64

IDS_PER_BLOCK = 1 << 14  # neighbouring ids that are drawn as one outcome first
FIRST_BLOCK = 1 << 32  # the number of block 0, beyond every id
WORD = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15
FACTOR_1, FACTOR_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SHIFT_1, SHIFT_2, SHIFT_3 = 30, 27, 31
SEEDS = 1 << 53  # uniforms are multiples of 1 / SEEDS
DROPPED_BITS = 12  # of 64; a double holds the middle of each of the intervals that are left
SPACING = 2.0**-52


def exponential(uniform: float, number: int) -> float:
    """The noise of one outcome: at least 2^-53, at most 36.8.

    Args:
        uniform: of the position, a multiple of 2^-53 in [0, 1).
        number: of the outcome: an id, or that of a block, which counts from FIRST_BLOCK.
    """
    word = int(uniform * SEEDS) + (number + 1) * STEP & WORD
    word = (word ^ word >> SHIFT_1) * FACTOR_1 & WORD
    word = (word ^ word >> SHIFT_2) * FACTOR_2 & WORD
    word ^= word >> SHIFT_3
    return -math.log(((word >> DROPPED_BITS) + 0.5) * SPACING)


def exponentials(uniform_N: Array, numbers_NK: Array) -> Array:
    """`exponential` of K outcomes of N positions, [N, K] in float64.

    Args:
        uniform_N: float64. numbers_NK: int64, [N, K] or [1, K].
    """
    xp = array_namespace(uniform_N)
    seed_N = xp.astype(uniform_N * SEEDS, xp.int64)
    word_NK = seed_N[:, None] + (numbers_NK + 1) * _signed(STEP)
    word_NK = (word_NK ^ _shifted(word_NK, SHIFT_1)) * _signed(FACTOR_1)
    word_NK = (word_NK ^ _shifted(word_NK, SHIFT_2)) * _signed(FACTOR_2)
    word_NK = word_NK ^ _shifted(word_NK, SHIFT_3)
    return -xp.log((float64(xp, _shifted(word_NK, DROPPED_BITS)) + 0.5) * SPACING)


def _signed(word: int) -> int:
    """The same 64 bits as a signed integer, whose products wrap around alike."""
    return word - (1 << 64)


def _shifted(word_NK: Array, bits: int) -> Array:
    """Signed integers shifted to the right as if they had no sign."""
    return (word_NK >> bits) & (WORD >> bits)

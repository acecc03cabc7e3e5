"""Noise of ids is that of SplitMix64, the same on floats and arrays, and independent between ids and positions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from midlogit.core.noise import FIRST_BLOCK, exponential, exponentials

UNIFORMS = np.random.default_rng(7).integers(0, 2**53, 2000) / 2**53
NUMBERS = np.array([0, 1, 2, 151_935, FIRST_BLOCK, FIRST_BLOCK + 9])


def test_the_words_are_those_of_splitmix64() -> None:
    """The first outputs for the seed 1234567, as published with the generator."""
    words = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = [exponential(1234567 / 2**53, number) for number in range(5)]
    assert found == [-math.log(((word >> 12) + 0.5) / 2**52) for word in words]


@pytest.mark.parametrize("to_array", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_arrays_hold_what_floats_give(to_array) -> None:
    uniforms = np.append(UNIFORMS[:50], [0.0, 1 - 2**-53])
    found_NK = np.asarray(exponentials(to_array(uniforms), to_array(NUMBERS[None, :])))
    expected = [[exponential(u, int(n)) for n in NUMBERS] for u in uniforms.tolist()]
    np.testing.assert_allclose(found_NK, expected, rtol=1e-15)


def test_noise_is_exponential_and_independent() -> None:
    """Along the ids of one position, along positions at one id, and between neighbours of either kind."""
    ids_1K = np.arange(2000)[None, :]
    shares_NK = np.exp(-exponentials(UNIFORMS, ids_1K))
    for shares in (shares_NK[0], shares_NK[:, 0], shares_NK.ravel()[::37]):
        assert stats.kstest(shares, "uniform").pvalue > 0.01
    for one, other in ((shares_NK[:, 1:], shares_NK[:, :-1]), (shares_NK[1:], shares_NK[:-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / one.size**0.5

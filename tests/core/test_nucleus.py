"""The nucleus against sorting the whole row, with ties, in every size that the candidates grow through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from midlogit.core import reference
from midlogit.core.nucleus import FIRST_CANDIDATES, nucleus


@pytest.mark.parametrize("to_array", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("vocabulary", [2, 50, FIRST_CANDIDATES, FIRST_CANDIDATES + 1, 5000])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.95, 1.0])
def test_nucleus_is_the_smallest_set(to_array, vocabulary: int, top_p: float) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(size=(6, vocabulary)) * np.array([[0.01], [0.5], [1], [2], [4], [8]])
    logits[1, : vocabulary // 3] = -np.inf
    ids, valid = nucleus(to_array(logits), to_array(np.full(6, top_p)))
    for row in range(6):
        found = np.asarray(ids[row])[np.asarray(valid[row])].tolist()
        assert found == sorted(found)
        if top_p == 1.0:  # every outcome, although rounded sums reach 1 before the last
            assert found == np.flatnonzero(np.isfinite(logits[row])).tolist()
        else:
            assert set(found) == reference.nucleus(reference.softmax(logits[row].tolist()), top_p)


@pytest.mark.parametrize("to_array", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("vocabulary", [64, 4096])
def test_ties_go_to_the_lower_ids(to_array, vocabulary: int) -> None:
    """Half-precision logits tie often: a flat row, and a row whose crossing level is wide."""
    flat, stepped = np.zeros(vocabulary), np.zeros(vocabulary)
    stepped[-3:] = 20.0
    ids, valid = nucleus(to_array(np.stack([flat, stepped])), to_array(np.array([0.2501, 0.5])))
    rows = [np.asarray(ids[i])[np.asarray(valid[i])].tolist() for i in range(2)]
    assert rows[0] == list(range(int(0.2501 * vocabulary) + 1))
    assert rows[1] == [vocabulary - 3, vocabulary - 2]

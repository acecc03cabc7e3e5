"""Lists of `top_logprobs` from the kernels' tables, as the user reads them and as they travel between processes."""

from __future__ import annotations

import gc
import pickle
import weakref

import numpy as np
import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

from midlogit.decide.kernels.decided import TableTop
from midlogit.outputs import Top

IDS_LK = np.arange(12, dtype=np.int32).reshape(3, 4)
LOGPROBS_LK = np.array([[-1, -2, -3, -4], [-0.5, -np.inf, -np.inf, -np.inf], [-1, -1, -1, -9.0]])


def test_rows_of_a_table_are_lists_without_ids_that_have_no_mass() -> None:
    top = TableTop(IDS_LK[:, :3], LOGPROBS_LK[:, :3])
    assert top.base == [(0, -1.0), (1, -2.0), (2, -3.0)]
    assert top.teacher == [(4, -0.5)]
    assert top.q == [(8, -1.0), (9, -1.0), (10, -1.0)]


def test_a_row_is_worth_its_lists_and_leaves_the_process_as_such() -> None:
    top = TableTop(IDS_LK[:, :2], LOGPROBS_LK[:, :2])
    plain = Top(top.q, top.base, top.teacher)
    assert top == plain == top
    assert top != TableTop(IDS_LK[:, :1], LOGPROBS_LK[:, :1])
    sent = pickle.loads(pickle.dumps(top))
    assert type(sent) is Top and sent == plain


def test_a_row_keeps_no_table_alive() -> None:
    tables = np.zeros((256, 3, 4), dtype=np.int32), np.zeros((256, 3, 4))
    top = TableTop(*(table[7, :, :2] for table in tables))
    alive = [weakref.ref(table) for table in tables]
    del tables
    gc.collect()
    assert [table() for table in alive] == [None, None] and len(top.q) == 2

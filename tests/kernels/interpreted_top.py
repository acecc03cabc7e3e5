"""The lists of `top_logprobs` by the kernels on the CPU; test_interpreter.py runs these tests with interpreted.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import FixedAlpha
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide.array_decider import ArrayDecider
from midlogit.decide.arrays import decide
from midlogit.decide.base import BonusRows, LogitRows, RowSettings
from midlogit.decide.kernels import launch as kernels
from midlogit.decide.kernels.decider import KernelDecider
from midlogit.outputs import Decision
from tests.kernels.cases import assert_agree, assert_top, listing, make_batch, mixed_settings
from tests.kernels.interpreted import PLAIN, run

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_lists(
    found: list[Decision],
    base_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    settings: list[RowSettings],
) -> None:
    """What the arrays decide, and the first of what they list."""
    all_ids = max(base_NV.shape[1], teacher_NV.shape[1])
    whole = [replace(s, top_logprobs=all_ids) for s in settings]
    truth = decide(base_NV.double(), teacher_NV.double(), whole)
    for i, (a, b, s) in enumerate(zip(found, truth, settings, strict=True)):
        where = f"row {i}, {s}"
        assert_agree(a, b, where)
        if s.top_logprobs and b.error is None:
            assert_top(a.top, b.top, s.top_logprobs, where)
        else:
            assert a.top is None, where


def test_lists_of_every_setting() -> None:
    for seed, vocabulary, dtype in (
        (1, 300, torch.float32),
        (2, 517, torch.bfloat16),
        (3, 641, torch.float16),
    ):
        base_NV, teacher_NV = (x.to(dtype) for x in make_batch(6, vocabulary, seed))
        settings = listing(mixed_settings(6, vocabulary, np.random.default_rng(seed)))
        assert_lists(run(base_NV, teacher_NV, settings), base_NV, teacher_NV, settings)


def test_lists_at_given_tokens() -> None:
    """They are those of the place, whichever token is given: hidden, of a stop class, or off the nucleus."""
    base_NV, teacher_NV = (x.bfloat16() for x in make_batch(8, 300, 1))
    drawn = mixed_settings(8, 300, np.random.default_rng(1))
    settings = [replace(s, given=(3, 10, 150, 200)[i % 4]) for i, s in enumerate(listing(drawn))]
    found = run(base_NV, teacher_NV, settings)
    assert_lists(found, base_NV, teacher_NV, settings)
    plain = [replace(s, top_logprobs=0) for s in settings]
    assert [replace(d, top=None) for d in found] == run(base_NV, teacher_NV, plain)


def test_the_lowest_of_equal_ids_come_first() -> None:
    """Rows of few values, so that ties lie at the end of every list, in one tile and in several."""
    generator = torch.Generator().manual_seed(3)
    base_NV, teacher_NV = (
        torch.randint(0, values, (4, 500), generator=generator).bfloat16() for values in (2, 3)
    )
    base_NV[3], teacher_NV[3] = 0, 0
    base_NV[3, [400, 450, 490]] = 1  # which take the places of the last of those that came before
    settings = [replace(PLAIN, rule=FixedAlpha(0.5), top_logprobs=k) for k in (1, 7, 32, 20)]
    for base, teacher, s, found in zip(
        base_NV, teacher_NV, settings, run(base_NV, teacher_NV, settings), strict=True
    ):
        for logits, some in (
            (base, found.top.base), (teacher, found.top.teacher), (base + teacher, found.top.q),
        ):  # fmt: skip
            order = torch.argsort(logits, descending=True, stable=True)
            assert [i for i, _ in some] == order[: s.top_logprobs].tolist()


def test_lists_as_long_as_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest list, fewer ids than it has places, and best ids that all lie at one place of the tiles."""
    monkeypatch.setattr(kernels, "LANES", 32)
    generator = torch.Generator().manual_seed(4)
    base_NV, teacher_NV = torch.randn((2, 3, 2700), generator=generator)
    for rows_NV in (base_NV, teacher_NV):
        rows_NV[1, 5::256] += 20
        rows_NV[2, 100:] = -torch.inf
    settings = [replace(PLAIN, top_logprobs=k) for k in (256, 40, 256)]
    found = run(base_NV, teacher_NV, settings)
    assert_lists(found, base_NV, teacher_NV, settings)
    assert [len(d.top.q) for d in found] == [256, 40, 100]


def test_lists_of_models_of_different_width() -> None:
    """A model's own list has the ids that it alone has; q has the stop class as its first id."""
    generator = torch.Generator().manual_seed(5)
    base_NV = 2 * torch.randn((6, 320), generator=generator)
    teacher_NV = 2 * torch.randn((6, 400), generator=generator)
    base_NV[:, 10] += 10
    teacher_NV[:, 10] += 10
    teacher_NV[:, 399] += 30
    outcomes = Outcomes(masked_ids=(3,), stop_ids=(10, 7))
    settings = [
        replace(PLAIN, outcomes=outcomes, top_logprobs=4, top_p=(None, 0.9, 1.0)[i % 3])
        for i in range(6)
    ]
    found = run(base_NV, teacher_NV, settings)
    assert_lists(found, base_NV, teacher_NV, settings)
    assert {d.top.teacher[0][0] for d in found} == {399}
    assert all(10 in dict(d.top.q) and 7 not in dict(d.top.q) for d in found)


def test_lists_of_rows_without_a_mixture() -> None:
    """Rows with an error have none; where both models have nothing in common, q is the teacher."""
    base_NV, teacher_NV = torch.randn(3, 200), torch.randn(3, 200)
    base_NV[0, 7] = torch.nan
    teacher_NV[2, :100], base_NV[2, 100:] = -torch.inf, -torch.inf
    hidden = Outcomes(masked_ids=tuple(range(200)))
    row = replace(PLAIN, top_logprobs=3)
    settings = [row, replace(row, outcomes=hidden), row]
    found = run(base_NV, teacher_NV, settings)
    assert_lists(found, base_NV, teacher_NV, settings)
    assert [d.top is None for d in found] == [True, True, False]
    assert found[2].fallback and found[2].top.q[0][0] == found[2].top.teacher[0][0]


def test_lists_of_a_round() -> None:
    """Two positions of three sequences, one with a bonus row: each decision has the lists of its own rows."""
    base_NV, teacher_NV = (x.float() for x in make_batch(6, 300, 4))
    drawn = mixed_settings(3, 300, np.random.default_rng(4))
    settings = [
        replace(way, top_logprobs=k, uniforms=TokenUniforms(*uniforms))
        for way, k, uniforms in zip(
            2 * drawn, 2 * (3, 0, 20), np.random.default_rng(5).random((6, 4)).tolist(), strict=True
        )
    ]
    results = []
    for decider in (KernelDecider(300, torch.device("cpu")), ArrayDecider(300)):
        draft_round = decider.start_round(settings, 3)
        draft_round.draft(LogitRows(base_NV, [2, 0, 1]), BonusRows([2], teacher_NV[[4]]))
        draft_round.draft(LogitRows(base_NV, [3, 5, 4]))
        results.append(draft_round.decide(LogitRows(teacher_NV, [0, 2, 4])).decisions())
    found, truth = results
    assert [d.token_id for d in found] == [d.token_id for d in truth]
    assert_lists(found, base_NV[[2, 0, 1, 3, 5, 4]], teacher_NV[[0, 2, 4, 1, 3, 5]], settings)

"""The kernels on the CPU: TRITON_INTERPRET=1 pytest tests/kernels/interpreted.py, as test_interpreter.py runs it.

Triton reads that variable when it is imported, so these tests need a process of their own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from midlogit.core import draw, reference
from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import EqualKL, FixedAlpha, KLBudget
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide.array_decider import ArrayDecider
from midlogit.decide.arrays import decide, draft
from midlogit.decide.base import BonusRows, Decider, LogitRows, RowSettings
from midlogit.decide.kernels import launch as kernels
from midlogit.decide.kernels.decider import KernelDecider
from midlogit.outputs import Decision
from tests.kernels.cases import assert_agree, kernel_settings, make_batch, mixed_settings
from tests.kernels.interpreter import patch_once_per_launch
from tests.rows import DoubleKL

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # NumPy's, where the kernel computes with infinities

patch_once_per_launch()

# Small tiles and blocks, so that small rows have several, and a nucleus that may or may not fit the copy.
kernels.LANES, kernels.FEW_LANES, kernels.CAPACITY = 16, 16, 128
kernels.IDS_PER_BLOCK = draw.IDS_PER_BLOCK = 256
torch.set_num_threads(1)
PLAIN = kernel_settings(uniforms=TokenUniforms(0.3, 0.6, 0.7))
RULES = {
    EqualKL(): reference.equal_kl,
    FixedAlpha(0.3): lambda p, t: 0.3,
    KLBudget(0.1): lambda p, t: reference.kl_budget(p, t, 0.1),
}


def run(
    base_NV: torch.Tensor, teacher_NV: torch.Tensor, settings: list[RowSettings], **rows: object
) -> list[Decision]:
    vocabulary = min(base_NV.shape[1], teacher_NV.shape[1])
    launcher = kernels.KernelLauncher(vocabulary, torch.device("cpu"))
    prepared = launcher.prepare(settings, **rows)
    decided = launcher.launch(base_NV, teacher_NV, prepared)
    decisions = decided.decisions()
    assert decided.token_ids() == decided.tokens_N.tolist() == [d.token_id for d in decisions]
    drafts = draft(base_NV.double(), settings, vocabulary)
    for found, true, decision in zip(decided.drafted_ids(), drafts, decisions, strict=True):
        assert found == true or decision.error is not None
    return decisions


def test_every_setting() -> None:
    for seed, vocabulary, dtype in (
        (1, 300, torch.float32),
        (2, 517, torch.bfloat16),
        (3, 641, torch.float16),
    ):
        base_NV, teacher_NV = (x.to(dtype) for x in make_batch(12, vocabulary, seed))
        settings = mixed_settings(12, vocabulary, np.random.default_rng(seed))
        truth = decide(base_NV.double(), teacher_NV.double(), settings)
        for i, (a, b) in enumerate(zip(run(base_NV, teacher_NV, settings), truth, strict=True)):
            assert_agree(a, b, f"seed {seed}, row {i}, {settings[i]}")


def test_every_way_to_a_token() -> None:
    """Accepted and rejected drafts: off the nucleus, of the stop class, greedy, forced, and with disjoint supports."""
    vocabulary, rows = 160, 24
    rng = np.random.default_rng(11)
    base_NV = torch.tensor(2 * rng.normal(size=(rows, vocabulary)))
    teacher_NV = base_NV + torch.tensor(rng.normal(size=(rows, vocabulary)))
    base_NV[:, 10] = 5.0  # a stop id
    teacher_NV[20:, : vocabulary // 2], base_NV[20:, vocabulary // 2 :] = -torch.inf, -torch.inf
    outcomes = Outcomes(masked_ids=(3,), stop_ids=(10, 159))
    ways: Counter[str] = Counter()
    for dtype, top_p in (
        (torch.float32, None),
        (torch.float32, 0.7),
        (torch.bfloat16, 0.7),
        (torch.float16, None),
    ):
        base, teacher = base_NV.to(dtype), teacher_NV.to(dtype)
        settings = [
            replace(
                PLAIN, outcomes=outcomes, top_p=top_p, uniforms=TokenUniforms(*rng.random(3).tolist()),
                temperature=(1.0, 0.7, 1.3, 0.0)[i % 4], forced=i % 9 == 0,
            )
            for i in range(rows)
        ]  # fmt: skip
        drafts = draft(base.double(), settings, vocabulary)
        truth = decide(base.double(), teacher.double(), settings)
        for i, (a, b) in enumerate(zip(run(base, teacher, settings), truth, strict=True)):
            assert_agree(a, b, f"{dtype}, {top_p}, row {i}, {settings[i]}")
            way = (
                "forced"
                if b.forced
                else "fallback"
                if b.fallback
                else "greedy"
                if i % 4 == 3
                else "mixed"
            )
            stopped = b.token_id in outcomes.stop_ids
            accepted = drafts[i] == b.token_id or (stopped and drafts[i] == 10)
            ways[f"{way} {'accepted' if accepted else 'rejected'}"] += 1
            ways["stop accepted"] += accepted and stopped and way == "mixed"
            ways["stop rejected"] += not accepted and drafts[i] == 10 and way == "mixed"
            outside = reference.mixture(
                base[i].tolist(), teacher[i].tolist(), temperature=settings[i].temperature or 1.0, masked_ids={3},
                stop_ids=(10, 159), top_p=top_p,
            ).q[drafts[i]] == 0  # fmt: skip
            ways["outside"] += outside and way == "mixed"
            assert not (outside and way == "mixed" and accepted)
    expected = [
        f"{way} {end}"
        for way in ("forced", "greedy", "mixed", "stop")
        for end in ("accepted", "rejected")
    ]
    assert all(ways[way] for way in (*expected, "fallback rejected", "outside")), ways


def test_given_tokens() -> None:
    """Likely and unlikely ids, hidden ones, all of a stop class, with a nucleus and without."""
    off, stopped = Counter[str](), 0
    for seed, vocabulary, dtype in ((1, 300, torch.float32), (2, 517, torch.bfloat16)):
        rng = np.random.default_rng(seed)
        base_NV, teacher_NV = (x.to(dtype) for x in make_batch(20, vocabulary, seed))
        drawn = mixed_settings(20, vocabulary, rng)
        likely = teacher_NV.nan_to_num().argmax(1).tolist()
        choices = [
            (token_id, 3, 5, 10, 150, *s.outcomes.stop_ids, int(rng.integers(vocabulary)))
            for token_id, s in zip(likely, drawn, strict=True)
        ]
        settings = [
            replace(s, given=int(rng.choice(ids)), may_end=True)
            for s, ids in zip(drawn, choices, strict=True)
        ]
        truth = decide(base_NV.double(), teacher_NV.double(), settings)
        for i, (a, b) in enumerate(zip(run(base_NV, teacher_NV, settings), truth, strict=True)):
            assert_agree(a, b, f"seed {seed}, row {i}, {settings[i]}")
            if b.error is None:
                outcomes = settings[i].outcomes
                stopped += outcomes.merged and b.token_id in outcomes.stop_ids
                off["nucleus" if b.constrained else "rows"] += b.logprob == -math.inf
                off["support"] += b.teacher_support_logprob == -math.inf
                off["none"] += b.logprob > -math.inf
    assert stopped > 3 and min(off[name] for name in ("nucleus", "rows", "support", "none")) > 0, (
        off
    )


def test_drafts_made_ahead() -> None:
    """Slices drafted one after the other, as rows of the base come, then decided with the table."""
    base_NV, teacher_NV = (x.float() for x in make_batch(12, 300, 4))
    settings = mixed_settings(12, 300, np.random.default_rng(4))
    base_rows = [13, 2, 5, 7, 0, 1, 9, 11, 12, 3, 4, 10]
    wide_NV = torch.full((14, 300), torch.nan)
    launcher = kernels.KernelLauncher(300, torch.device("cpu"))
    prepared = launcher.prepare(settings, base_rows)
    drafts_RC = launcher.allocate_drafts(14)
    drafted: list[int] = []
    for first in range(0, 12, 4):
        some = slice(first, first + 4)
        wide_NV[base_rows[some]] = base_NV[some]
        drafted += launcher.draft(wide_NV, prepared, drafts_RC, some).tolist()
    assert launcher.draft(wide_NV, prepared, drafts_RC, slice(5, 5)).tolist() == []
    decided = launcher.launch(wide_NV, teacher_NV, prepared, drafts_RC)
    assert decided.drafted_ids() == drafted == draft(base_NV.double(), settings, 300)
    assert decided.decisions() == run(base_NV, teacher_NV, settings)


def test_a_base_that_drafts_nothing() -> None:
    """Every drawable logit of the base is −inf: the teacher is drawn from."""
    base_NV, teacher_NV = torch.full((8, 200), -torch.inf), torch.randn(8, 200)
    base_NV[:, 0] = 1.0
    launcher = kernels.KernelLauncher(200, torch.device("cpu"))
    for top_p in (None, 0.9):
        settings = [
            replace(
                PLAIN,
                outcomes=Outcomes(masked_ids=(0,)),
                top_p=top_p,
                uniforms=TokenUniforms(u, u, u),
            )
            for u in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999)
        ]
        decided = launcher.launch(base_NV, teacher_NV, launcher.prepare(settings))
        truth = decide(base_NV.double(), teacher_NV.double(), settings)
        assert decided.drafted_ids() == [0] * 8
        for a, b in zip(decided.decisions(), truth, strict=True):
            assert_agree(a, b)
            assert a.fallback


def test_against_the_plain_reference() -> None:
    base_NV, teacher_NV = (x.float() for x in make_batch(6, 240, 5))
    for rule, plain in RULES.items():
        settings = [
            replace(
                PLAIN, rule=rule, outcomes=Outcomes((1, 2), (8, 200)), temperature=0.8, top_p=0.9
            )
        ] * 6
        for i, found in enumerate(run(base_NV, teacher_NV, settings)):
            truth = reference.mixture(
                base_NV[i].tolist(), teacher_NV[i].tolist(), temperature=0.8, masked_ids={1, 2}, stop_ids=(8, 200),
                top_p=0.9, rule=plain,
            )  # fmt: skip
            if truth.kl_base + truth.kl_teacher > 1e-10 and not found.fallback:
                assert abs(found.alpha - truth.alpha) <= 1e-4, (rule, i)
            for name in ("kl_base", "kl_teacher", "entropy", "ess_base", "ess_teacher"):
                a, b = getattr(found, name), getattr(truth, name)
                assert math.isclose(
                    a, b, rel_tol=1e-4, abs_tol=1e-6 if name == "entropy" else 1e-12
                ), (rule, i, name)


def test_rows_of_larger_buffers() -> None:
    """Some rows of a buffer, and ids that one model alone has: they hold mass, and may end a sequence."""
    base_rows, teacher_rows = [8, 0, 3], [1, 1, 4]
    for base_size, teacher_size in ((320, 400), (401, 320)):
        base_NV, teacher_NV = 2 * torch.randn(9, base_size), 2 * torch.randn(5, teacher_size)
        base_NV[:, 320:] += 3
        teacher_NV[:, 320:] += 3
        launcher = kernels.KernelLauncher(320, torch.device("cpu"))
        for top_p in (None, 0.9):
            for stops in ((), (10, 7, 330, 399), (10, 399)):
                own = Outcomes(stop_ids=stops), Outcomes(stop_ids=stops, stop_id="base")
                row = replace(PLAIN, top_p=top_p, temperature=0.8)
                settings = [
                    replace(row, outcomes=own[i], uniforms=TokenUniforms(u, u, u, u))
                    for i, u in ((1, 0.02), (0, 0.4), (1, 0.9))
                ]
                decided = launcher.launch(
                    base_NV, teacher_NV, launcher.prepare(settings, base_rows, teacher_rows)
                )
                truth = decide(
                    base_NV[base_rows].double(), teacher_NV[teacher_rows].double(), settings
                )
                for a, b in zip(decided.decisions(), truth, strict=True):
                    assert_agree(a, b)
                shared = [d.token_id if d.token_id < 320 else 10 for d in truth]
                assert decided.tokens_N.tolist() == shared
                drafts = draft(base_NV[base_rows].double(), settings, 320)
                assert decided.drafted_ids() == drafts
    # Nothing but the stop class has mass: what ends the text is the teacher's own id.
    base_NV, teacher_NV = torch.full((1, 320), -30.0), torch.full((1, 400), -30.0)
    base_NV[:, 10], teacher_NV[:, 399] = 10.0, 10.0
    for top_p in (None, 0.9):
        settings = [replace(PLAIN, outcomes=Outcomes(stop_ids=(10, 399)), top_p=top_p)]
        launcher = kernels.KernelLauncher(320, torch.device("cpu"))
        decided = launcher.launch(base_NV, teacher_NV, launcher.prepare(settings))
        assert decided.token_ids() == [399] and decided.tokens_N.tolist() == [10]
        assert_agree(
            decided.decisions()[0], decide(base_NV.double(), teacher_NV.double(), settings)[0]
        )


def test_the_stop_id_of_the_base() -> None:
    """Rows that most likely end: the id by the base's own conditional, or its most likely."""
    base_NV, teacher_NV = torch.randn(12, 200), torch.randn(12, 203)
    stops = (10, 150, 201)
    base_NV[:, [10, 150]] = torch.tensor([9.0, 8.5])
    teacher_NV[:, 201] = 9.0
    base_NV[11, [10, 150]] = -torch.inf
    outcomes = Outcomes(stop_ids=stops, stop_id="base")
    settings = [
        replace(
            PLAIN, outcomes=outcomes, top_p=(None, 0.9)[i % 2], temperature=(0.7, 1.0, 0.0)[i % 3],
            uniforms=TokenUniforms(0.5, 0.5, 0.5, i / 12), forced=i == 11,
        )
        for i in range(12)
    ]  # fmt: skip
    found = run(base_NV, teacher_NV, settings)
    for a, b in zip(found, decide(base_NV.double(), teacher_NV.double(), settings), strict=True):
        assert_agree(a, b)
    assert {d.token_id for d in found[:11]} == {10, 150} and found[11].token_id == 10


def test_what_cannot_be_drawn() -> None:
    base_NV, teacher_NV = torch.randn(6, 200), torch.randn(6, 200)
    base_NV[0, 7], teacher_NV[1, 199], base_NV[2] = torch.nan, torch.inf, -torch.inf
    hidden = Outcomes(masked_ids=tuple(range(200)))
    teacher_NV[4, :100], base_NV[4, 100:] = -torch.inf, -torch.inf
    base_NV[5] = teacher_NV[5]
    for top_p in (None, 0.9):
        row = replace(PLAIN, top_p=top_p)
        settings = [row, row, row, replace(row, outcomes=hidden), row, row]
        found, truth = (
            run(base_NV, teacher_NV, settings),
            decide(base_NV.double(), teacher_NV.double(), settings),
        )
        for a, b in zip(found, truth, strict=True):
            assert_agree(a, b)
        assert [d.error is None for d in found] == [False] * 4 + [True] * 2
        assert found[4].fallback and found[4].kl_base == math.inf and found[5].alpha == 0.5


def test_rows_that_agree_to_rounding() -> None:
    """Equal models whose logits were computed in two ways: α is ½; and the whole support at top-p 1."""
    rows, vocabulary = 3, 300
    base_NV = 4 * torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(5))
    teacher_NV = base_NV + 3e-6 * torch.randn(
        (rows, vocabulary), generator=torch.Generator().manual_seed(6)
    )
    for top_p in (None, 0.95, 1.0):
        for temperature in (0.5, 1.0, 10.0):
            settings = [replace(PLAIN, top_p=top_p, temperature=temperature)] * rows
            found, truth = run(base_NV, teacher_NV, settings), decide(base_NV, teacher_NV, settings)
            assert {d.alpha for d in found} == {0.5} == {d.alpha for d in truth}
    base_NV, teacher_NV = (x.float() for x in make_batch(8, vocabulary, 9))
    settings = [replace(PLAIN, top_p=1.0)] * 8
    truth = decide(base_NV.double(), teacher_NV.double(), settings)
    for i, (a, b) in enumerate(zip(run(base_NV, teacher_NV, settings), truth, strict=True)):
        assert_agree(a, b, f"top-p 1, row {i}")


def test_ties_at_the_edge_of_the_nucleus() -> None:
    flat_NV = torch.zeros(4, 200)
    flat_NV[1, 50:60] = 1.0
    base_NV = torch.randn(4, 200)
    settings = [
        replace(PLAIN, rule=FixedAlpha(1.0), top_p=0.951, uniforms=TokenUniforms(u, 0.5, u))
        for u in (0.2, 0.5, 0.999, 0.9999)
    ]
    for a, b in zip(
        run(base_NV, flat_NV, settings),
        decide(base_NV.double(), flat_NV.double(), settings),
        strict=True,
    ):
        assert_agree(a, b)


def test_which_rows_are_left_to_arrays() -> None:
    many = Outcomes(stop_ids=tuple(range(65)))
    assert kernels.handles(PLAIN) and kernels.handles(replace(PLAIN, given=4, top_logprobs=256))
    assert not kernels.handles(replace(PLAIN, top_logprobs=2, return_support=True))
    assert not kernels.handles(replace(PLAIN, outcomes=many))
    assert not kernels.handles(replace(PLAIN, rule=DoubleKL()))


def mixed_ways(rows: int, vocabulary: int) -> list[RowSettings]:
    """Settings of which every second row is left to arrays: a rule of this test, ids of the support."""
    support = {"return_support": True, "top_p": 0.9}
    changes = [{"rule": DoubleKL(), "forced": False}, support, {**support, "given": 20}]
    settings = mixed_settings(rows, vocabulary, np.random.default_rng(4))
    for i in range(0, rows, 2):
        settings[i] = replace(settings[i], **changes[i // 2 % 3])
    return settings


def test_a_batch_of_which_kernels_take_some_rows() -> None:
    base_NV, teacher_NV = (x.float() for x in make_batch(12, 300, 4))
    settings = mixed_ways(12, 300)
    base, teacher = LogitRows(base_NV.flip(0), range(11, -1, -1)), LogitRows(teacher_NV, range(12))
    found = KernelDecider(300, torch.device("cpu")).decide(base, teacher, settings)
    truth = ArrayDecider(300).decide(base, teacher, settings)
    assert found.token_ids() == truth.token_ids()
    assert found.tokens_N.tolist() == truth.tokens_N.tolist()
    for i, (a, b) in enumerate(zip(found.decisions(), truth.decisions(), strict=True)):
        assert_agree(a, b, f"row {i}, {settings[i]}")
        assert a.support == b.support
        if (
            isinstance(settings[i].rule, DoubleKL)
            and a.error is None
            and not a.fallback
            and 0 < a.alpha < 1
        ):
            assert math.isclose(a.kl_base, 2 * a.kl_teacher, rel_tol=1e-4, abs_tol=1e-9)


def test_a_round_of_which_kernels_take_some_sequences() -> None:
    """Three positions of four sequences, of which two have a bonus row at the first.

    The second and the third may be drafted together.
    """
    base_NV, teacher_NV = (x.float() for x in make_batch(12, 300, 4))
    ways = mixed_ways(4, 300)
    settings = [
        replace(way, uniforms=row.uniforms)
        for row, way in zip(
            mixed_settings(12, 300, np.random.default_rng(5)), 3 * ways, strict=True
        )
    ]

    def play(
        decider: Decider, steps: Sequence[Sequence[int]] = ((0,), (1,), (2,))
    ) -> tuple[list[int], list[int], list[int]]:
        draft_round = decider.start_round(settings, 4)
        drafted = []
        for positions in steps:
            base = LogitRows(base_NV, [4 * p + n for p in positions for n in (2, 0, 3, 1)])
            bonus = BonusRows([1, 2], teacher_NV[[3, 6]]) if positions == (0,) else None
            drafted += draft_round.draft(base, bonus).tolist()
        decided = draft_round.decide(LogitRows(teacher_NV, [0, 3, 6, 9]))
        return drafted, decided.token_ids(), decided.tokens_N.tolist()

    drafted, token_ids, tokens = play(KernelDecider(300, torch.device("cpu")))
    assert (drafted, token_ids, tokens) == play(ArrayDecider(300))
    assert [drafted[n] for n in (1, 2)] == [tokens[n] for n in (1, 2)]
    for decider in (KernelDecider(300, torch.device("cpu")), ArrayDecider(300)):
        assert (drafted, token_ids, tokens) == play(decider, [(0,), (1, 2)])

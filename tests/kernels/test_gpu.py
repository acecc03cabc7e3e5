"""The decision by kernels on CUDA against float64 arrays and the reference, at the sizes and types of real models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from midlogit.core import reference
from midlogit.core.outcomes import Outcomes
from midlogit.core.uniforms import TokenUniforms
from midlogit.decide import decider_for
from midlogit.decide.array_decider import ArrayDecider
from midlogit.decide.arrays import decide, draft
from midlogit.decide.base import LogitRows
from midlogit.decide.kernels import available
from tests.kernels.cases import (
    OF_THE_TOKEN,
    assert_agree,
    assert_top,
    kernel_settings,
    listing,
    make_batch,
    mixed_settings,
)
from tests.law import chi_square_p
from tests.rows import DoubleKL

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> torch.device:
    device = torch.device("cuda")
    if not available(device):
        pytest.skip("needs Triton")
    return device


def launched(base_NV, teacher_NV, settings):
    from midlogit.decide.kernels.launch import KernelLauncher

    launcher = KernelLauncher(base_NV.shape[1], base_NV.device)
    return launcher.launch(base_NV, teacher_NV, launcher.prepare(settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [151936, 100003, 4097, 333])
def test_every_setting_agrees_with_arrays(device, dtype, vocabulary: int) -> None:
    rows = 36
    base_NV, teacher_NV = (x.to(device, dtype) for x in make_batch(rows, vocabulary, vocabulary))
    settings = mixed_settings(rows, vocabulary, np.random.default_rng(vocabulary))
    decided = launched(base_NV, teacher_NV, settings)
    truth = decide(base_NV.double(), teacher_NV.double(), settings)
    drafts = draft(base_NV.double(), settings, base_NV.shape[1])
    moved = strayed = 0
    for i, (a, b) in enumerate(zip(decided.decisions(), truth, strict=True)):
        if b.error is None:
            strayed += decided.drafted_ids()[i] != drafts[i]
        if a.token_id != b.token_id and b.error is None:
            # A uniform fell between the two ends of a token as float32 and float64 see them, or greedy met a tie.
            moved += 1
            a = replace(a, **{name: getattr(b, name) for name in OF_THE_TOKEN})
        assert_agree(a, b, f"row {i}, {settings[i]}")
    assert moved <= 2 and strayed <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_drafts_made_ahead_change_nothing(device, dtype) -> None:
    from midlogit.decide.kernels.launch import KernelLauncher

    rows, vocabulary = 15, 5003
    base_NV, teacher_NV = (x.to(device, dtype) for x in make_batch(rows, vocabulary, 2))
    settings = mixed_settings(rows, vocabulary, np.random.default_rng(2))
    launcher = KernelLauncher(vocabulary, device)
    prepared = launcher.prepare(settings)
    drafts_RC = launcher.allocate_drafts(rows)
    drafted = [
        launcher.draft(base_NV, prepared, drafts_RC, slice(k, k + 3)) for k in range(0, rows, 3)
    ]
    decided = launcher.launch(base_NV, teacher_NV, prepared, drafts_RC)
    at_once = launcher.launch(base_NV, teacher_NV, prepared)
    assert decided.drafted_ids() == torch.cat(drafted).tolist() == at_once.drafted_ids()
    assert decided.decisions() == at_once.decisions()


def test_rows_that_the_kernels_do_not_handle(device) -> None:
    """A rule of this test and a row that asks for its support go to arrays, in the order of the batch."""
    base_NV, teacher_NV = (x.to(device, torch.float32) for x in make_batch(9, 5003, 7))
    settings = mixed_settings(9, 5003, np.random.default_rng(7))
    settings[1::3] = [replace(row, rule=DoubleKL()) for row in settings[1::3]]
    settings[2::3] = [replace(row, top_p=0.9, return_support=True) for row in settings[2::3]]
    base, teacher = LogitRows(base_NV, range(9)), LogitRows(teacher_NV, range(9))
    found = decider_for(5003, device).decide(base, teacher, settings)
    truth = ArrayDecider(5003).decide(base, teacher, settings)
    assert found.tokens_N.tolist() == found.token_ids() == truth.token_ids()
    for a, b in zip(found.decisions(), truth.decisions(), strict=True):
        assert_agree(a, b)
        assert a.support == b.support


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [151936, 5003])
def test_lists_agree_with_arrays(device, dtype, vocabulary: int) -> None:
    """`top_logprobs` of rows of every kind, up to the longest list, of the numbers that one row has or another."""
    rows = 12
    base_NV, teacher_NV = (x.to(device, dtype) for x in make_batch(rows, vocabulary, 3))
    settings = listing(mixed_settings(rows, vocabulary, np.random.default_rng(3)))
    settings[3] = replace(settings[3], top_logprobs=256)
    found = launched(base_NV, teacher_NV, settings).decisions()
    for i, (decision, row) in enumerate(zip(found, settings, strict=True)):
        whole = replace(row, top_logprobs=vocabulary)
        (truth,) = decide(base_NV[[i]].double(), teacher_NV[[i]].double(), [whole])
        assert decision.error == truth.error
        if truth.error is None and row.top_logprobs:
            assert_top(decision.top, truth.top, row.top_logprobs, f"row {i}, {row}")
        else:
            assert decision.top is None


@pytest.mark.parametrize("sizes", [(151936, 152064), (152064, 151936), (4097, 4100)])
def test_models_of_different_width(device, sizes: tuple[int, int]) -> None:
    """Ids that one model alone has hold mass, and one of them ends its texts."""
    from midlogit.decide.kernels.launch import KernelLauncher

    rows, vocabulary = 12, min(sizes)
    base_NV, teacher_NV = (
        x[:, :size].to(device, torch.bfloat16)
        for x, size in zip(make_batch(rows, max(sizes), 6), sizes, strict=True)
    )
    outcomes = Outcomes(masked_ids=(3,), stop_ids=(10, max(sizes) - 1))
    settings = [
        kernel_settings(outcomes=outcomes, top_p=top_p, uniforms=TokenUniforms(u, u, u))
        for top_p in (None, 0.95)
        for u in np.linspace(0.01, 0.99, rows // 2).tolist()
    ]
    launcher = KernelLauncher(vocabulary, device)
    decided = launcher.launch(base_NV, teacher_NV, launcher.prepare(settings))
    truth = decide(base_NV.double(), teacher_NV.double(), settings)
    moved = 0
    for a, b in zip(decided.decisions(), truth, strict=True):
        if a.token_id != b.token_id and b.error is None:
            moved += 1
            a = replace(a, **{name: getattr(b, name) for name in OF_THE_TOKEN})
        assert_agree(a, b)
    assert moved <= 1
    assert max(decided.tokens_N.tolist()) < vocabulary


def test_it_agrees_with_the_plain_reference(device) -> None:
    base_NV, teacher_NV = (x.float() for x in make_batch(12, 3001, 8))
    settings = [
        kernel_settings(outcomes=Outcomes((1, 2), (8, 3000)), temperature=0.8, top_p=0.9)
    ] * 12
    for i, found in enumerate(
        launched(base_NV.to(device), teacher_NV.to(device), settings).decisions()
    ):
        truth = reference.mixture(
            base_NV[i].tolist(), teacher_NV[i].tolist(), temperature=0.8, masked_ids={1, 2}, stop_ids=(8, 3000),
            top_p=0.9,
        )  # fmt: skip
        assert found.alpha == pytest.approx(truth.alpha, abs=1e-4) or truth.kl_base < 1e-10
        assert found.kl_base == pytest.approx(truth.kl_base, rel=1e-4, abs=1e-12)
        assert found.kl_teacher == pytest.approx(truth.kl_teacher, rel=1e-4, abs=1e-12)


def test_stop_ids_follow_the_base(device) -> None:
    """Ids of a drawn class by the base's own conditional, each with the ratio of the class."""
    draws, vocabulary, stops = 20000, 5003, (7, 900, 4001)
    base_NV, teacher_NV = (x.to(device, torch.float32) for x in make_batch(1, vocabulary, 3))
    base_NV[0, list(stops)] = base_NV.max() + torch.tensor([1.0, 0.5, 0.0], device=device)
    teacher_NV[0, 900] = teacher_NV.max() + 3
    outcomes = Outcomes(stop_ids=stops, stop_id="base")
    uniforms = np.random.default_rng(5).random((draws, 4)).tolist()
    settings = [
        kernel_settings(outcomes=outcomes, temperature=0.7, uniforms=TokenUniforms(*u))
        for u in uniforms
    ]
    tiled = (x.expand(draws, -1).contiguous() for x in (base_NV, teacher_NV))
    ended = [d for d in launched(*tiled, settings).decisions() if d.token_id in stops]
    share = reference.softmax(base_NV[0, list(stops)].tolist(), 0.7)
    assert len(ended) > draws / 10
    assert chi_square_p([stops.index(d.token_id) for d in ended], share) > 1e-3
    ratios = [d.base_tempered_logprob - d.logprob for d in ended]
    assert max(ratios) - min(ratios) < 1e-4


@pytest.mark.parametrize("top_p", [None, 0.95])
def test_tokens_follow_q(device, top_p: float | None) -> None:
    draws, vocabulary = 20000, 5003
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((2, vocabulary), generator=generator)
    logits[:, 100:130] += 7 + torch.randn((2, 30), generator=generator)
    base_NV, teacher_NV = (row.to(device, torch.bfloat16).expand(draws, -1) for row in logits)
    uniforms = np.random.default_rng(5).random((draws, 3)).tolist()
    settings = [kernel_settings(top_p=top_p, uniforms=TokenUniforms(*u)) for u in uniforms]
    decided = launched(base_NV, teacher_NV, settings)
    counts = Counter(decided.token_ids())
    q = reference.mixture(base_NV[0].tolist(), teacher_NV[0].tolist(), top_p=top_p).q
    cells = [(draws * q[i], counts[i]) for i in range(vocabulary) if draws * q[i] >= 5]
    rest = draws - sum(c[0] for c in cells), draws - sum(c[1] for c in cells)
    cells += [rest] if rest[0] >= 5 else []
    chi2 = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    freedom = len(cells) - 1
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5
    assert all(q[i] > 0 for i in counts)
    accepted = sum(a == b for a, b in zip(decided.token_ids(), decided.drafted_ids(), strict=True))
    rate = (
        torch.minimum(torch.tensor(q, dtype=torch.float64), base_NV[0].double().softmax(-1).cpu())
        .sum()
        .item()
    )
    assert abs(accepted - draws * rate) < 5 * (draws * rate * (1 - rate)) ** 0.5


def test_a_launch_does_not_wait(device) -> None:
    from midlogit.decide.kernels.launch import KernelLauncher

    base_NV, teacher_NV = (x.to(device, torch.bfloat16) for x in make_batch(6, 4097, 1))
    launcher = KernelLauncher(4097, device)
    settings = listing(mixed_settings(6, 4097, np.random.default_rng(1)))
    expected = launcher.launch(
        base_NV, teacher_NV, launcher.prepare(settings)
    ).token_ids()  # compiles
    torch.cuda._sleep(1_000_000_000)
    prepared, drafts_RC = launcher.prepare(settings), launcher.allocate_drafts(6)
    launcher.draft(base_NV, prepared, drafts_RC)
    decided = launcher.launch(base_NV, teacher_NV, prepared, drafts_RC)
    launched = torch.cuda.Event()
    launched.record()
    assert not launched.query()
    assert decided.token_ids() == expected == decided.tokens_N.tolist()


def test_no_kernel_is_left_to_compile_after_a_warm_up(device) -> None:
    """Half precision, which no other test takes: what they compiled is of no use here."""
    from midlogit.decide.kernels.draft import draft_kernel
    from midlogit.decide.kernels.solve import solve_kernel
    from midlogit.decide.kernels.teacher_scan import teacher_scan_kernel

    def compiled() -> list[int]:
        kernels = draft_kernel, teacher_scan_kernel, solve_kernel
        return [len(kernel.device_caches[0][0]) for kernel in kernels]

    before, vocabulary = compiled(), 4096
    rows = [x.to(device, torch.float16) for x in make_batch(6, vocabulary, 1)]
    decider = decider_for(vocabulary, device)
    decider.warm_up(*(row_NV[:1] for row_NV in rows))
    warm = compiled()
    assert [now - then for now, then in zip(warm, before, strict=True)] == [1, 2, 3]

    settings = mixed_settings(6, vocabulary, np.random.default_rng(1))
    assert {s.top_p is None for s in settings} == {True, False}
    base, teacher = (LogitRows(row_NV, range(6)) for row_NV in rows)
    for some in (settings, [replace(s, top_p=None) for s in settings]):
        decider.decide(base, teacher, some).token_ids()
        round_ = decider.start_round(some, 2)
        for position in range(3):
            round_.draft(LogitRows(rows[0], [2 * position, 2 * position + 1]))
        round_.decide(LogitRows(rows[1], [0, 3])).token_ids()
    assert compiled() == warm


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(device, tool: str) -> None:
    """Addresses beyond the rows, and sums that read what others still write; each tool slows the kernels down a lot."""
    sanitizer = shutil.which(
        "compute-sanitizer", path=f"{os.environ['PATH']}{os.pathsep}/usr/local/cuda/bin"
    )
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit")
    done = subprocess.run(
        [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "tests.kernels.sanitized",
        ],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "SUMMARY: 0 " in done.stdout, (
        done.stdout[-4000:] + done.stderr[-2000:]
    )

"""The local engine on CUDA: the same text as on the CPU, by kernels, in half precision, with one model per device."""

from __future__ import annotations

import pytest
import torch

from midlogit import Pair, SamplingParams
from midlogit.decide.array_decider import ArrayDecider
from tests.questions import QUESTIONS

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams.preset("balanced", temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def expected(pair: Pair) -> list[list[int]]:
    return [c.token_ids for c in pair.generate(QUESTIONS, GREEDY, chat=True)]


def same_share(found, expected: list[list[int]]) -> float:
    return sum(c.token_ids == ids for c, ids in zip(found, expected, strict=True)) / len(expected)


def test_float32_gives_the_text_of_the_cpu(expected) -> None:
    with Pair.local(device="cuda", dtype="float32", max_num_seqs=5) as pair:
        found = pair.generate(QUESTIONS, GREEDY, chat=True)
        assert same_share(found, expected) >= 0.9  # near ties may fall either way
        assert (
            max(
                abs(a - b)
                for c in found
                for a, b in zip(
                    c.diagnostics.kl_base[1:], c.diagnostics.kl_teacher[1:], strict=True
                )
            )
            <= 1e-5
        )


@pytest.mark.parametrize("preset", ["balanced", "exploratory"])
@pytest.mark.parametrize("speculation", ["off", 3])
def test_kernels_give_the_tokens_of_arrays(preset: str, speculation: str | int) -> None:
    from midlogit.decide.kernels.decider import KernelDecider

    sampled = SamplingParams.preset(preset, seed=3, max_tokens=40)
    with Pair.local(device="cuda", dtype="float32", speculation=speculation) as pair:
        assert isinstance(pair.engine.decider, KernelDecider)
        by_kernels = pair.generate(QUESTIONS, sampled, chat=True)
        pair.engine.decider = ArrayDecider(pair.mixing.alignment.size)
        by_arrays = pair.generate(QUESTIONS, sampled, chat=True)

    # Within 1e-6 of the boundary between two tokens, float32 sums may fall on either side (docs/kernel.md).
    assert same_share(by_kernels, [c.token_ids for c in by_arrays]) >= 0.9
    for a, b in zip(by_kernels, by_arrays, strict=True):
        if a.token_ids == b.token_ids:
            assert a.text == b.text and a.finish_reason == b.finish_reason
            assert a.diagnostics.kl_base == pytest.approx(b.diagnostics.kl_base, rel=1e-3, abs=1e-6)
            assert a.diagnostics.logprobs == pytest.approx(b.diagnostics.logprobs, abs=1e-4)


def test_bfloat16_is_the_default_and_runs_sampled(expected) -> None:
    with Pair.local(device="cuda") as pair:
        assert pair.engine.teacher.model.dtype == torch.bfloat16
        found = pair.generate(
            QUESTIONS, SamplingParams.preset("exploratory", seed=1, max_tokens=40), chat=True
        )
        assert all(c.finish_reason in ("stop", "length") and c.text for c in found)
        assert (
            max(
                abs(a - b)
                for c in found
                for a, b in zip(c.diagnostics.kl_base, c.diagnostics.kl_teacher, strict=True)
            )
            <= 1e-5
        )


@pytest.mark.parametrize("devices", [("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1")])
def test_one_model_per_device(devices: tuple[str, str], expected) -> None:
    if devices[1] == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with Pair.local(device=devices, dtype="float32") as pair:
        assert [str(side.device) for side in (pair.engine.base, pair.engine.teacher)] == list(
            devices
        )
        assert same_share(pair.generate(QUESTIONS, GREEDY, chat=True), expected) >= 0.9

"""The local engine on CUDA: the same greedy text as on the CPU, in half precision, with one model a device."""

from __future__ import annotations

import pytest
import torch

from midlogit import Pair, SamplingParams
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
                for a, b in zip(c.diagnostics.kl_base[1:], c.diagnostics.kl_teacher[1:], strict=True)
            )
            <= 1e-5
        )


def test_bfloat16_is_the_default_and_runs_sampled(expected) -> None:
    with Pair.local(device="cuda") as pair:
        assert pair.engine.teacher.model.dtype == torch.bfloat16
        found = pair.generate(QUESTIONS, SamplingParams.preset("exploratory", seed=1, max_tokens=40), chat=True)
        assert all(c.finish_reason in ("stop", "length") and c.text for c in found)
        assert (
            max(abs(a - b) for c in found for a, b in zip(c.diagnostics.kl_base, c.diagnostics.kl_teacher, strict=True))
            <= 1e-5
        )


@pytest.mark.parametrize("devices", [("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1")])
def test_one_model_a_device(devices: tuple[str, str], expected) -> None:
    if devices[1] == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with Pair.local(device=devices, dtype="float32") as pair:
        assert [str(side.device) for side in (pair.engine.base, pair.engine.teacher)] == list(devices)
        assert same_share(pair.generate(QUESTIONS, GREEDY, chat=True), expected) >= 0.9

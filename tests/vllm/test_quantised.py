"""Quantised checkpoints, as far as vLLM has kernels for them on a CPU: AWQ and GPTQ of 4 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from midlogit import Pair, SamplingParams, Scores
from tests.conftest import BASE, TEACHER
from tests.quantised import quantise
from tests.questions import QUESTIONS
from tests.vllm.conftest import open_pair, require_empty

TEXTS = QUESTIONS[:6]


def logprobs(scores: list[Scores], side: str) -> np.ndarray:
    return np.concatenate([getattr(one.diagnostics, f"{side}_logprobs") for one in scores])


def has_kernels() -> bool:
    """Whether vLLM's build for this processor has kernels of 4 bits: that for AVX2 has none."""
    import vllm._custom_ops  # noqa: F401  (loads them)

    return hasattr(torch.ops._C, "cpu_gemm_wna16")


@pytest.mark.skipif("not has_kernels()", reason="no kernels of 4 bits for this processor")
def test_scores_are_those_of_the_values_that_are_stored(tmp_path: Path, pair: Pair) -> None:
    """In bfloat16, whose rounding moves them less than 4 bits do. Drafts are accepted among them."""
    folders = {"base": tmp_path / "base", "teacher": tmp_path / "teacher"}
    for folder in folders.values():
        folder.mkdir()
    base, plain_base = quantise(folders["base"], BASE, "awq")
    teacher, plain_teacher = quantise(folders["teacher"], TEACHER, "gptq")
    with open_pair(base=base, teacher=teacher, dtype="bfloat16", speculation=3) as quantised:
        found = quantised.score(TEXTS)
        for one in quantised.generate(TEXTS, SamplingParams(max_tokens=12, seed=1)):
            assert one.error is None
        assert quantised.statistics()["speculation"]["accepted"] > 0
        require_empty(quantised)
    with Pair.local(plain_base, plain_teacher, device="cpu", dtype="float32") as plain:
        expected = plain.score(TEXTS)
    original = pair.score(TEXTS)
    for side in folders:
        rounding = np.abs(logprobs(found, side) - logprobs(expected, side)).mean()
        quantisation = np.abs(logprobs(original, side) - logprobs(expected, side)).mean()
        assert rounding < 0.4 * quantisation

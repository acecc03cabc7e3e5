"""Two GPUs against one, with real models; skipped where either is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.local import PROMPTS as CHATS
from midlogit import Completion, Pair, SamplingParams
from tests.ties import require_equal_up_to_ties

pytestmark = [pytest.mark.gpu, pytest.mark.real_models]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_real_pair_has_the_tokens_of_one_gpu() -> None:
    """Qwen2.5-Coder 0.5B and 1.5B in float32, chat prompts side by side.

    SmolLM2 would be smaller, but two devices cannot share its 9 or 15 heads.
    """
    folder = Path(os.environ["MIDLOGIT_MODELS"])
    models = {"base": folder / "qwen-0.5b", "teacher": folder / "qwen-1.5b"}
    asked = SamplingParams.preset("exploratory", temperature=0, max_tokens=48, top_logprobs=2)

    def texts(ranks: int) -> list[Completion]:
        options = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16}
        with Pair.vllm(**models, **options, tensor_parallel_size=ranks, speculation=3) as pair:
            return pair.generate(CHATS, asked, chat=True)

    assert require_equal_up_to_ties(texts(2), texts(1)) > 12 * 30

"""Real models on vLLM inside the test process; skipped where they are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.local import PROMPTS as CHATS
from midlogit import Completion, Pair, SamplingParams
from tests.ties import require_equal_up_to_ties
from tests.vllm.conftest import open_pair, require_empty
from tests.vllm.test_engine import BASE_PROMPTS, PROMPTS, require_equal


@pytest.mark.real_models
def test_smollm_against_itself_with_another_prompt() -> None:
    """A real tokenizer and 49,152 ids: the same model on both sides, which see different prompts."""
    folder = Path(os.environ["MIDLOGIT_MODELS"]) / "smollm2-135m"
    asked = SamplingParams.preset("exploratory", temperature=0, max_tokens=24)
    with open_pair(
        base=folder, teacher=folder, max_num_seqs=32, max_num_batched_tokens=64, max_model_len=512
    ) as ours:
        found = ours.generate(PROMPTS, asked, base_prompts=BASE_PROMPTS)
        require_empty(ours)
    with Pair.local(folder, folder, device="cpu", dtype="float32") as local:
        expected = local.generate(PROMPTS, asked, base_prompts=BASE_PROMPTS)
    require_equal(found, expected)


@pytest.mark.real_models
def test_greedy_drafts_of_a_real_pair_give_the_text_of_lock_step() -> None:
    """Qwen2.5-Coder 0.5B and 1.5B, 12 chat prompts side by side."""
    folder = Path(os.environ["MIDLOGIT_MODELS"])
    asked = SamplingParams.preset("exploratory", temperature=0, max_tokens=48, top_logprobs=2)

    def texts(speculation: int | str) -> list[Completion]:
        models = {"base": folder / "qwen-0.5b", "teacher": folder / "qwen-1.5b"}
        with open_pair(**models, speculation=speculation) as pair:
            found = pair.generate(CHATS, asked, chat=True)
            assert (pair.statistics()["speculation"]["accepted"] > 12 * 20) is (
                speculation != "off"
            )
            return found

    assert require_equal_up_to_ties(texts(4), texts("off")) > 12 * 30

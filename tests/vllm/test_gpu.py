"""vLLM on the GPU, CUDA graphs and all: each sequence was sampled from its own rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from midlogit import Pair, SamplingParams
from midlogit.models.checkpoint import bundled
from tests.adapters import merge, write_adapter
from tests.questions import QUESTIONS
from tests.vllm.conftest import require_empty

pytestmark = pytest.mark.gpu


@torch.inference_mode()
def logprobs_alone(prompt: list[int], tokens: list[int], model) -> list[float]:
    """log-probabilities of the tokens after the prompt by one plain float32 forward."""
    rows = (
        model(torch.tensor([prompt + tokens], device="cuda"))
        .logits[0, len(prompt) - 1 : -1]
        .log_softmax(-1)
    )
    return rows[range(len(tokens)), tokens].tolist()


@pytest.mark.parametrize("is_adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("speculation", ["off", 3])
def test_rows_belong_to_their_sequences(
    tmp_path: Path, speculation: int | str, is_adapted: bool
) -> None:
    """With LoRA adapters on both sides, too, whose merged weights the rows are compared with.

    bfloat16 against float32: raw log-probabilities agree on both sides but for rounding, and both KLs are equal.
    """
    prompts = [" ".join(["river"] * (13 * n % 60)) + QUESTIONS[n % 16] for n in range(96)]
    base_prompts = [" ".join(["stone"] * (7 * n % 50)) + QUESTIONS[(n + 3) % 16] for n in range(96)]
    params = SamplingParams(seed=1, max_tokens=40)
    options = {
        "dtype": "bfloat16",
        "max_num_seqs": 64,
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
    }
    models = {side: bundled(side) for side in ("base", "teacher")}
    if is_adapted:
        for side, model in models.items():
            adapter = write_adapter(tmp_path / f"{side}_lora", model)
            options[f"{side}_lora"] = adapter
            models[side] = merge(tmp_path / side, model, adapter)
    with Pair.vllm(speculation=speculation, **options) as pair:
        found = pair.generate(prompts, params, base_prompts=base_prompts)
        again = pair.generate(prompts[:8], params, base_prompts=base_prompts[:8])
        mixing = pair.mixing
        require_empty(pair)
        fewest = 100 if is_adapted else 500
        assert (pair.statistics()["speculation"]["accepted"] > fewest) is (speculation != "off")
    assert {c.finish_reason for c in found} <= {"stop", "length"}
    assert (
        sum(a.token_ids == b.token_ids for a, b in zip(again, found, strict=False)) >= 6
    )  # batches round differently
    for side, texts in (("base", base_prompts), ("teacher", prompts)):
        model = (
            transformers.AutoModelForCausalLM.from_pretrained(models[side], dtype=torch.float32)
            .cuda()
            .eval()
        )
        off = []
        for completion, text in zip(found, texts, strict=True):
            tokens = completion.token_ids[:-1]  # the last may stand for the merged stop ids
            alone = logprobs_alone(getattr(mixing, side).encode(text), tokens, model)
            off += list(
                np.abs(
                    np.subtract(
                        alone, getattr(completion.diagnostics, f"{side}_logprobs")[: len(tokens)]
                    )
                )
            )
        assert len(off) > 1000 and np.mean(off) < 0.03 and max(off) < 0.6
    kls = [
        abs(a - b)
        for c in found
        for a, b, free in zip(
            c.diagnostics.kl_base, c.diagnostics.kl_teacher, c.diagnostics.alpha, strict=True
        )
        if free < 1
    ]
    assert len(kls) > 1000 and max(kls) < 1e-4

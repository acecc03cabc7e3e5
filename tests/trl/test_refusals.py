"""What would be silently wrong in TRL is refused with a sentence, before anything is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

from midlogit import EngineFailure, EqualKL, InvalidRequest, KLBudget, Pair, SamplingParams
from midlogit.integrations.trl import MidlogitGeneration, attach
from tests.trl.trainers import BASE, PROMPTS, count_of_e, grpo

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and transformers

ROLLOUT = SamplingParams.preset("rollout", max_tokens=24)


@pytest.fixture(scope="module")
def pair() -> Any:
    with Pair.local(max_num_seqs=16) as pair:
        yield pair


@pytest.mark.parametrize(
    ("options", "params", "named"),
    [
        ({"top_p": 0.9}, ROLLOUT, "top_p"),
        ({"top_k": 50}, ROLLOUT, "top_k"),
        ({"min_p": 0.1}, ROLLOUT, "min_p"),
        ({"repetition_penalty": 1.1}, ROLLOUT, "repetition_penalty"),
        ({"vllm_importance_sampling_correction": False}, ROLLOUT, "correction"),
        ({}, SamplingParams.preset("rollout", stop_id="teacher"), "stop_id"),
        ({}, SamplingParams.preset("rollout", constraint_to_target=True), "top-p"),
        ({}, SamplingParams.preset("rollout", force_first_token=True), "first token"),
        ({}, SamplingParams.preset("rollout", alpha_rule=EqualKL()), "sequence_mask"),
        ({}, SamplingParams.preset("rollout", alpha_rule=KLBudget(0.05)), "1.2 nats"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_would_be_silently_wrong(
    tmp_path: Path, pair: Pair, options: dict[str, Any], params: SamplingParams, named: str
) -> None:
    trainer = grpo(tmp_path, **options)
    with pytest.raises(InvalidRequest, match=named):
        attach(trainer, MidlogitGeneration(pair, params))
    assert not trainer.use_vllm


def test_rloo(tmp_path: Path, pair: Pair) -> None:
    trainer = RLOOTrainer(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
        count_of_e,
        RLOOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(BASE),
    )
    with pytest.raises(InvalidRequest, match="GRPOTrainer"):
        attach(trainer, MidlogitGeneration(pair))


def test_dropout(tmp_path: Path, pair: Pair) -> None:
    trainer = grpo(tmp_path)
    trainer.model.config.attention_dropout = 0.1
    with pytest.raises(InvalidRequest, match="disable_dropout"):
        attach(trainer, MidlogitGeneration(pair))


def test_weights_per_token_are_called_biased(tmp_path: Path, pair: Pair) -> None:
    trainer = grpo(tmp_path, vllm_importance_sampling_mode="token_truncate")
    params = SamplingParams.preset("rollout", alpha_rule=EqualKL())
    with pytest.warns(UserWarning, match="biased"):
        attach(trainer, MidlogitGeneration(pair, params))


def test_a_failed_rollout_is_an_error_and_no_empty_row(tmp_path: Path) -> None:
    trainer = grpo(tmp_path)
    pair = Pair.local(max_num_seqs=16)
    attach(trainer, MidlogitGeneration(pair))
    pair.close()
    with pytest.raises(EngineFailure):
        trainer.train()


def test_the_trainers_temperature_and_length_are_taken(tmp_path: Path, pair: Pair) -> None:
    trainer = grpo(tmp_path, temperature=0.7, max_completion_length=9)
    generation = MidlogitGeneration(pair)
    attach(trainer, generation)
    assert (generation.params.temperature, generation.params.max_tokens) == (0.7, 9)

"""GRPO on the bundled pair: trainers as a user builds them, and what they saw."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from midlogit.models.checkpoint import bundled

BASE, TEACHER = bundled("base"), bundled("teacher")
PROMPTS = [
    "Once upon a time there was a fox",
    "Question: Why is the sky blue?\nAnswer:",
    "The little girl went to",
    "Question: What do cats like?\nAnswer:",
]


def count_of_e(completions: list[Any], **_: object) -> list[float]:
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(text.count("e")) for text in texts]


def grpo(
    folder: Path,
    *,
    prompts: list[Any] | None = None,
    reward: Callable[..., list[float]] = count_of_e,
    peft_config: Any = None,
    rollout_func: Any = None,
    **options: Any,
) -> GRPOTrainer:
    """A trainer of the bundled base; TRL's defaults except for size, device and `options`."""
    options = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_steps": 3,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "bf16": False,
        **options,
    }
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
        reward,
        GRPOConfig(
            str(folder),
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_dict({"prompt": (prompts or PROMPTS) * 8}),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=peft_config,
        rollout_func=rollout_func,
    )


class Watch:
    """What a trainer computed for each batch, and its weights at that time.

    Attributes:
        outputs: of `_generate_and_score_completions`. weights: state of the module before each.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.outputs: list[dict[str, Any]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        score = trainer._generate_and_score_completions

        def watched(inputs: Any) -> Any:
            model = trainer.accelerator.unwrap_model(trainer.model)
            self.weights.append(deepcopy(model.state_dict()))
            found = score(inputs)
            self.outputs.append({k: v for k, v in found.items() if torch.is_tensor(v)})
            return found

        trainer._generate_and_score_completions = watched


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    """A metric of each logged step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]

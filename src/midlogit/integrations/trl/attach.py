"""Putting the generation backend into a trainer; knows which attributes of TRL's trainers say that they have one."""

from __future__ import annotations

from typing import Any

from midlogit.integrations.trl.checks import (
    USE_LOGPROBS,
    kind_of,
    require_correction,
    require_neutral,
    require_own_generation,
    require_ratios,
    require_student_stops,
)
from midlogit.integrations.trl.generation import MidlogitGeneration


def attach(trainer: Any, generation: MidlogitGeneration) -> None:
    """Has a trainer draw its rollouts from q*.

    GRPO, Distillation, GOLD and IW-OPD are known. The trainer is built with `use_vllm=False`; afterwards it treats
    `generation` as its vLLM, and corrects for q* as the behaviour policy.

    Raises:
        InvalidRequest: something would make training silently wrong; says what to change (docs/training.md).
    """
    kind = kind_of(trainer)
    generation.bind(trainer)
    params, args = generation.params, trainer.args

    require_own_generation(trainer)
    require_neutral(args, params)
    require_student_stops(trainer, generation.pair.mixing, params)
    if kind in USE_LOGPROBS:
        require_ratios(trainer, params)
    if kind == "GRPOTrainer":
        require_correction(trainer, params)
        _watch_noise(trainer, generation)
        if not (trainer.rollout_func or trainer.tools or generation.reads_ids):
            trainer.rollout_func = generation.rollout_func

    trainer.use_vllm, trainer.vllm_mode, trainer.vllm_generation = True, "server", generation
    trainer._last_loaded_step = -1  # of GRPO and Distillation
    trainer._last_vllm_sync_step, trainer.vllm_sync_frequency = -1, 1  # of GOLD and IW-OPD


def _watch_noise(trainer: Any, generation: MidlogitGeneration) -> None:
    """Has GRPO report each batch after it has computed its own log-probabilities."""
    score = trainer._generate_and_score_completions

    def watched(inputs: Any) -> Any:
        outputs = score(inputs)
        generation.log_noise(outputs)
        return outputs

    trainer._generate_and_score_completions = watched

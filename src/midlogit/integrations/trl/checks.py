"""What must hold for rollouts from q* to be right in a trainer of TRL: each refusal says what to change.

Knows the attributes of TRL 1.16's trainers; the traps are listed in docs/training.md.
"""

from __future__ import annotations

import warnings
from typing import Any

from midlogit.integrations.checks import SEQUENCE_NATS, most_nats, require
from midlogit.models.mixing import Mixing
from midlogit.params import SamplingParams

USE_LOGPROBS = ("GRPOTrainer", "IWOPDTrainer")  # their losses weigh a sample by its probability
USE_STATES = ("DistillationTrainer", "GOLDTrainer")  # their losses look at whole rows where q* went
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}


def kind_of(trainer: Any) -> str:
    """Which of the known trainers this is."""
    names = [kind.__name__ for kind in type(trainer).__mro__]
    require(
        "RLOOTrainer" not in names,
        "RLOOTrainer ignores the log-probabilities of rollouts, so those of q* would count as the policy's own.",
        "Use GRPOTrainer, which corrects for them.",
    )
    known = [name for name in names if name in USE_LOGPROBS + USE_STATES]
    require(
        bool(known),
        f"{names[0]} is not a trainer whose use of rollouts is known.",
        f"Known are {', '.join(USE_LOGPROBS + USE_STATES)}.",
    )
    return known[0]


def require_own_generation(trainer: Any) -> None:
    """The trainer neither has a vLLM nor weights that are on no process whole."""
    require(
        not trainer.use_vllm,
        "The trainer has a vLLM of its own.",
        "Build it with use_vllm=False: attach takes vLLM's place.",
    )
    accelerator = trainer.accelerator
    sharded = getattr(accelerator.state, "fsdp_plugin", None) is not None or (
        accelerator.state.deepspeed_plugin is not None
        and accelerator.state.deepspeed_plugin.zero_stage == 3
    )
    require(
        not sharded,
        "The trainer's weights are sharded over processes (FSDP or ZeRO-3).",
        "Use TRL's server mode with `midlogit serve --train`, to which it sends whole weights.",
    )


def require_neutral(args: Any, params: SamplingParams) -> None:
    """The trainer asks for nothing that q* does not honour."""
    for name, neutral in NEUTRAL.items():
        value = getattr(args, name, neutral)
        require(
            value in (neutral, None),
            f"{name} is {value}, which q* does not honour.",
            f"Set {name}={neutral}.",
        )
    require(
        params.temperature > 0, "temperature is 0.", "Rollouts are samples: give a temperature."
    )


def require_student_stops(trainer: Any, mixing: Mixing, params: SamplingParams) -> None:
    """A completion must end in an id that the trainer takes for an end."""
    foreign = set(mixing.teacher.stop_ids) - set(mixing.base.stop_ids)
    require(
        params.stop_id == "base" or not foreign,
        f"stop_id is 'teacher': rollouts end with {sorted(foreign)}, which the student hardly emits, and the trainer"
        " counts them as cut off.",
        "Use SamplingParams.preset('rollout'), or stop_id='base'.",
    )
    ends = getattr(trainer, "eos_token_ids", None)
    if ends is not None:
        ends.extend(i for i in mixing.base.stop_ids if i not in ends)


def require_ratios(trainer: Any, params: SamplingParams) -> None:
    """log q* of a token must be comparable with the trainer's log-probability of it."""
    require(
        not params.constraint_to_target,
        f"Rollouts are held to the teacher's top-p {params.target_top_p}: what the policy would do outside has no"
        " weight, so the loss is biased, and TRL cannot renormalise on the support.",
        "Use SamplingParams.preset('rollout'), or constraint_to_target=False.",
    )
    require(
        not params.force_first_token,
        "The first token is forced to the teacher, so its weight is the ratio to the teacher alone.",
        "Use SamplingParams.preset('rollout'), or force_first_token=False.",
    )
    dropouts = [m for m in trainer.model.modules() if type(m).__name__ == "Dropout" and m.p > 0]
    rates = [getattr(trainer.model.config, "attention_dropout", 0.0) or 0.0]
    require(
        not dropouts and not any(rates),
        "The model has dropout, so the trainer's log-probabilities are of another policy than the one that drew.",
        "Set disable_dropout=True, and lora_dropout=0.0.",
    )


def require_correction(trainer: Any, params: SamplingParams) -> None:
    """GRPO must weigh its samples, and by weights that do not vanish."""
    require(
        trainer.vllm_importance_sampling_correction,
        "vllm_importance_sampling_correction is off: rollouts from q* would count as the policy's own.",
        "Set vllm_importance_sampling_correction=True.",
    )
    mode = trainer.vllm_importance_sampling_mode
    nats = most_nats(params)
    if mode.startswith("sequence"):
        budget = f"kl-budget:{SEQUENCE_NATS / params.max_tokens:.2g}"
        require(
            nats <= SEQUENCE_NATS,
            f"vllm_importance_sampling_mode is {mode!r}, and {params.alpha_rule.spec} allows {nats:.3g} nats in"
            f" {params.max_tokens} tokens: weights of whole completions vanish, and nothing is learned.",
            f"Use alpha_rule='{budget}' or less, or token_truncate, which is biased but learns.",
        )
    elif nats > SEQUENCE_NATS:
        warnings.warn(
            f"vllm_importance_sampling_mode is {mode!r}: weights of single tokens leave the law of the prefixes at q*,"
            " so the gradient is biased. A KL budget with a sequence mode is not (docs/training.md).",
            stacklevel=3,
        )

"""What must hold for rollouts from q* to be right in a run of verl: each refusal says what to change.

Knows the configuration of verl 0.9.1; asks no server. The traps are listed in docs/verl.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from midlogit.integrations.checks import SEQUENCE_NATS, most_nats, require
from midlogit.params import SamplingParams

Config = Mapping[str, Any]
NEUTRAL = {"top_p": (1,), "top_k": (-1, 0), "repetition_penalty": (1,)}
SAMPLING = ("temperature", "top_p", "top_k")  # by which validation differs from training
NO_LOGPROBS = ("raw_logits", "processed_logits")


def require_trainable(config: Config, params: SamplingParams) -> None:
    """Refuses a configuration with which training would be silently wrong.

    Args:
        config: verl's whole configuration. params: of the rollouts.

    Raises:
        InvalidRequest: says what to change.
    """
    rollout, model = config["actor_rollout_ref"]["rollout"], config["actor_rollout_ref"]["model"]
    _require_own_servers(rollout, model)
    _require_neutral(rollout)
    _require_logprobs(rollout)
    _require_correction(config["algorithm"].get("rollout_correction") or {}, params)
    _require_distinct_validation(config.get("trainer") or {}, rollout)


def is_training(rollout: Config, sampling_params: Config) -> bool:
    """Whether verl asks for a training rollout: validation and greedy baselines sample otherwise."""
    return all(sampling_params[name] == rollout[name] for name in SAMPLING)


def _require_own_servers(rollout: Config, model: Config) -> None:
    """verl's servers are vLLM, and give everyone the policy itself."""
    require(
        rollout["name"] == "vllm",
        f"rollout.name is {rollout['name']!r}: the base's log-probabilities come from verl's vLLM servers.",
        "Set rollout.name=vllm.",
    )
    lora = model.get("lora") or {}
    require(
        not (model.get("lora_rank") or lora.get("rank")) or bool(lora.get("merge")),
        "The policy is a LoRA adapter, which verl's servers apply to verl's own calls alone: q* would be mixed of the"
        " model without it.",
        "Set actor_rollout_ref.model.lora.merge=True.",
    )
    require(
        not rollout.get("enable_rollout_routing_replay"),
        "rollout.enable_rollout_routing_replay is on, and rollouts from q* carry no routed experts.",
        "Turn it off.",
    )


def _require_neutral(rollout: Config) -> None:
    """verl asks for nothing that q* does not honour."""
    for name, neutral in NEUTRAL.items():
        value = rollout.get(name, neutral[0])
        require(
            value in neutral,
            f"rollout.{name} is {value}, which q* does not honour: its support is the whole vocabulary.",
            f"Set rollout.{name}={neutral[0]}.",
        )
    require(
        rollout["temperature"] > 0,
        "rollout.temperature is 0.",
        "Rollouts are samples: give a temperature.",
    )
    require(
        not rollout.get("full_determinism"),
        "rollout.full_determinism is on, and the draws of q* take a fresh seed for each rollout.",
        "Turn it off.",
    )


def _require_logprobs(rollout: Config) -> None:
    """verl keeps the log-probabilities of rollouts, and its servers' are comparable with the trainer's."""
    require(
        bool(rollout.get("calculate_log_probs")),
        "rollout.calculate_log_probs is off: verl would drop log q*, and q* count as the policy.",
        "Set rollout.calculate_log_probs=True.",
    )
    mode, temperature = rollout.get("logprobs_mode"), rollout["temperature"]
    require(
        mode not in NO_LOGPROBS,
        f"rollout.logprobs_mode is {mode!r}, which are no log-probabilities.",
        "Set rollout.logprobs_mode=processed_logprobs.",
    )
    require(
        mode != "raw_logprobs" or temperature == 1,
        f"rollout.logprobs_mode is raw_logprobs and rollout.temperature {temperature}: what other agent loops record is"
        f" at temperature 1, and the trainer compares it at {temperature}.",
        "Set rollout.logprobs_mode=processed_logprobs.",
    )


def _require_correction(correction: Config, params: SamplingParams) -> None:
    """verl weighs its samples by the policy over q*, with weights that do not vanish."""
    level = correction.get("rollout_is")
    require(
        level in ("token", "sequence") and correction.get("rollout_is_threshold", 2.0) is not None,
        f"algorithm.rollout_correction.rollout_is is {level}: rollouts from q* would count as the policy's own.",
        "Set algorithm.rollout_correction.rollout_is=sequence (examples/train/verl/midlogit.yaml).",
    )
    require(
        not correction.get("bypass_mode"),
        "algorithm.rollout_correction.bypass_mode is on: q* takes the place of the old policy, and PPO clips the ratio"
        " to it in place of weighing by it.",
        "Set algorithm.rollout_correction.bypass_mode=False.",
    )

    nats = most_nats(params)
    if level == "sequence":
        budget = f"kl-budget:{SEQUENCE_NATS / params.max_tokens:.2g}"
        require(
            nats <= SEQUENCE_NATS,
            f"rollout_is is 'sequence', and {params.alpha_rule.spec} allows {nats:.3g} nats in {params.max_tokens}"
            " tokens: weights of whole completions vanish, and nothing is learned.",
            f"Use alpha_rule: {budget} or less, or rollout_is=token, which is biased but learns.",
        )
    elif nats > SEQUENCE_NATS:
        warnings.warn(
            "rollout_is is 'token': weights of single tokens leave the law of the prefixes at q*, so the gradient is"
            " biased. A KL budget with rollout_is=sequence is not (docs/training.md).",
            stacklevel=3,
        )


def _require_distinct_validation(trainer: Config, rollout: Config) -> None:
    """Validation can be told from training, since an agent loop is given its sampling parameters alone."""
    validates = trainer.get("val_before_train") or trainer.get("test_freq", -1) > 0
    require(
        not validates or not is_training(rollout, rollout["val_kwargs"]),
        "rollout.val_kwargs are the sampling parameters of training: validation would sample q*, not the policy.",
        "Set rollout.val_kwargs.temperature to another value, such as 0 or 0.99.",
    )

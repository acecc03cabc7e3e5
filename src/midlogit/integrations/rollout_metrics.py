"""Numbers per training step about rollouts from q*; knows rollouts and a trainer's log-probabilities, no trainer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from midlogit.rollout import Rollout


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over the tokens or completions of a batch of rollouts.

    Returns:
        alpha, kl: per token; kl is KL(q‖base), in nats.
        stop_rate: share of completions that ended by themselves.
        shift: mean of log q* − log base of the drawn tokens, in nats: how far the rollouts are meant to be from the
            policy.
        ratio_mean: mean of base over q* per token; 1 if q* covers the policy, less by the mass that it leaves out.
        sequence_ess: effective sample size of the weights base over q* of whole completions, as a share of them.
        sequence_kl: KL(q‖base) summed over a completion, in nats.
    """
    gaps = [_gap(rollout) for rollout in rollouts]
    log_weights = np.array([gap.sum() for gap in gaps])
    weights = np.exp(log_weights - log_weights.max())
    gap = np.concatenate(gaps)
    kl = np.concatenate([rollout.kl_base for rollout in rollouts])

    return {
        "alpha": float(np.mean(np.concatenate([rollout.alpha for rollout in rollouts]))),
        "kl": float(kl.mean()),
        "sequence_kl": float(kl.sum() / len(rollouts)),
        "stop_rate": float(np.mean([rollout.finish_reason == "stop" for rollout in rollouts])),
        "shift": float(-gap.mean()),
        "ratio_mean": float(np.exp(gap).mean()),
        "sequence_ess": float(weights.sum() ** 2 / (weights**2).sum() / len(weights)),
    }


def noise_metrics(
    rollouts: Sequence[Rollout], trained: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Distances between the trainer's log-probabilities of the drawn tokens and those of the base that drew them.

    They are the engine's noise and staleness, which no mixture intends: 0 for a shared module in float32.

    Args:
        trained: the trainer's, one row per rollout, padded at the end.
    """
    differences = np.concatenate(
        [
            np.abs(np.array(row[: len(rollout.token_ids)]) - rollout.base_logprobs)
            for rollout, row in zip(rollouts, trained, strict=True)
        ]
    )
    return {
        "engine_noise_mean": float(differences.mean()),
        "engine_noise_max": float(differences.max()),
    }


def _gap(rollout: Rollout) -> NDArray[np.float64]:
    """log base − log q* of each drawn token, at the sampling temperature."""
    return np.subtract(rollout.base_logprobs, rollout.logprobs, dtype=np.float64)

"""Numbers per training step about rollouts from q*; knows rollouts and a trainer's log-probabilities, no trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from midlogit.rollout import Rollout


class RolloutSums(NamedTuple):
    """What the metrics of a batch need of one rollout, sums over its tokens; small enough to gather from processes.

    Attributes:
        tokens: number of them. alpha, kl: of α and of KL(q‖base). ratio: of the base's probability over q's.
        log_weight: log base − log q* of the whole completion.
        stopped: whether it ended by itself.
    """

    tokens: int
    alpha: float
    kl: float
    ratio: float
    log_weight: float
    stopped: bool

    @classmethod
    def of(cls, rollout: Rollout) -> RolloutSums:
        """Of a rollout at its sampling temperature."""
        gap = np.subtract(rollout.base_logprobs, rollout.logprobs, dtype=np.float64)
        return cls(
            tokens=len(rollout.token_ids),
            alpha=sum(rollout.alpha),
            kl=sum(rollout.kl_base),
            ratio=float(np.exp(gap).sum()),
            log_weight=float(gap.sum()),
            stopped=rollout.finish_reason == "stop",
        )


def rollout_metrics(sums: Sequence[RolloutSums]) -> dict[str, float]:
    """Means over the tokens or completions of a batch of rollouts.

    Returns:
        alpha, kl: per token; kl is KL(q‖base), in nats.
        sequence_kl: KL(q‖base) summed over a completion, in nats.
        stop_rate: share of completions that ended by themselves.
        shift: mean of log q* − log base of the drawn tokens, in nats: how far the rollouts are meant to be from the
            policy.
        ratio_mean: mean of base over q* per token; 1 if q* covers the policy, less by the mass that it leaves out.
        sequence_ess: effective sample size of the weights base over q* of whole completions, as a share of them.
    """
    tokens, alpha, kl, ratio, log_weight, stopped = np.array(sums, dtype=np.float64).T
    weights = np.exp(log_weight - log_weight.max())
    return {
        "alpha": float(alpha.sum() / tokens.sum()),
        "kl": float(kl.sum() / tokens.sum()),
        "sequence_kl": float(kl.mean()),
        "stop_rate": float(stopped.mean()),
        "shift": float(-log_weight.sum() / tokens.sum()),
        "ratio_mean": float(ratio.sum() / tokens.sum()),
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

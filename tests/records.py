"""What a rollout must say, recomputed by plain forwards of both models."""

from __future__ import annotations

import math

import torch

from midlogit import Rollout

PRECISION = 2e-5  # of log-probabilities from float32 logits


@torch.inference_mode()
def tempered(
    model: torch.nn.Module, prompt: list[int], completion: list[int], temperature: float
) -> list[float]:
    """log softmax(logits / T) of each id of a completion, as a trainer computes it."""
    logits_TV = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
    logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    return [float(row[i]) for row, i in zip(logprobs_TV, completion, strict=True)]


def assert_recomputed(
    rollout: Rollout, models: tuple[torch.nn.Module, torch.nn.Module], temperature: float
) -> None:
    """The log-probabilities of both models equal a trainer's."""
    prompts = rollout.prompt_token_ids, rollout.teacher_prompt_token_ids
    reported = rollout.base_logprobs, rollout.teacher_logprobs
    for model, prompt, found in zip(models, prompts, reported, strict=True):
        truth = tempered(model, prompt, rollout.token_ids, temperature)
        assert max(abs(a - b) for a, b in zip(found, truth, strict=True)) < PRECISION


def mean_ratio(rollouts: list[Rollout]) -> float:
    """The mean of π/q over all tokens, 1 on average where the support is the vocabulary."""
    ratios = [
        math.exp(base - logprob)
        for rollout in rollouts
        for base, logprob in zip(rollout.base_logprobs, rollout.logprobs, strict=True)
    ]
    return sum(ratios) / len(ratios)

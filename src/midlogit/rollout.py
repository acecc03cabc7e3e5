"""A completion as a trainer of the base takes it: ids and log-probabilities; knows no trainer.

Ratios, effective sample sizes and what a support leaves out are in docs/theory.md section 9.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class WeightVersion(NamedTuple):
    """Which version of the base's weights drew the tokens [start, end) of a completion."""

    version: int | str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion sampled from q*, one entry per generated token in each list; `Completion.rollout` makes it.

    Attributes:
        prompt_token_ids: what the base read, which is the policy. teacher_prompt_token_ids: what the teacher read.
        token_ids: the generated ids, the ending one included.
        logprobs: log q*, the log-probability under which each id was drawn.
        base_logprobs, teacher_logprobs: of the same ids, at the sampling temperature over the model's whole vocabulary:
            what a trainer recomputes. The importance ratio is exp(base_logprobs − logprobs).
        base_support_logprobs, teacher_support_logprobs: of the drawn outcomes as they entered the solve: tempered,
            masked, stop ids merged, normalised on the support.
        base_support_logmass, teacher_support_logmass: log of the mass of the support under each whole tempered model,
            0 where nothing is masked and no nucleus is held.
        alpha: weight of the teacher. kl_base, kl_teacher: KL(q‖base), KL(q‖teacher) on the support, in nats.
        support: the ids of each support, where return_support asked for them.
        finish_reason: stop, length or abort.
        weight_versions: which version of the base's weights drew which tokens; empty while no version was ever set.
        weights_changed: sides whose server had other weights than it should have, as in `Completion`.
    """

    prompt_token_ids: list[int]
    teacher_prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    base_logprobs: list[float]
    teacher_logprobs: list[float]
    base_support_logprobs: list[float]
    teacher_support_logprobs: list[float]
    base_support_logmass: list[float]
    teacher_support_logmass: list[float]
    alpha: list[float]
    kl_base: list[float]
    kl_teacher: list[float]
    support: list[list[int]] | None
    finish_reason: Literal["stop", "length", "abort"]
    weight_versions: list[WeightVersion]
    weights_changed: list[Literal["base", "teacher"]]
    text: str

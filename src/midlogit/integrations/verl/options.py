"""What a verl run says of its rollouts from q*; knows one section of verl's configuration, asks no server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from midlogit.core.rules import AlphaRule, parse_rule
from midlogit.integrations.checks import require
from midlogit.params import SamplingParams

SECTION = "actor_rollout_ref.rollout.custom.midlogit"
KEYS = ("teacher", "alpha_rule", "max_tv_bound")


@dataclass(frozen=True, slots=True)
class Options:
    """The section `actor_rollout_ref.rollout.custom.midlogit` of verl's configuration.

    Attributes:
        teacher: OpenAI URLs of the teacher's vLLM servers, ending in /v1.
        alpha_rule: how α is chosen at each token; None for the budget of the preset "rollout".
        max_tv_bound: lists of log-probabilities widen where the certified bound on the total variation to the exact q*
            exceeds it, and a rollout with a token where it exceeds it even so is masked.
    """

    teacher: tuple[str, ...]
    alpha_rule: AlphaRule | None
    max_tv_bound: float

    @classmethod
    def of(cls, rollout: Mapping[str, Any]) -> Options:
        """Reads the section of `actor_rollout_ref.rollout`.

        Raises:
            InvalidRequest: no teacher, an unknown key, or a value that cannot be honoured.
        """
        section = (rollout.get("custom") or {}).get("midlogit") or {}
        teacher = section.get("teacher") or ()
        urls = (teacher,) if isinstance(teacher, str) else tuple(teacher)
        rule = section.get("alpha_rule")
        bound = float(section.get("max_tv_bound", 0.1))

        unknown = sorted(set(section) - set(KEYS))
        require(not unknown, f"{SECTION} has {unknown}.", f"It has {', '.join(KEYS)}.")
        require(
            bool(urls),
            f"{SECTION}.teacher is missing.",
            "Give the URL of the teacher's `vllm serve`, ending in /v1.",
        )
        require(
            0 < bound <= 1,
            f"{SECTION}.max_tv_bound is {bound}.",
            "It is a total variation: above 0, at most 1.",
        )
        return cls(urls, None if rule is None else parse_rule(rule), bound)

    def params(self, rollout: Mapping[str, Any]) -> SamplingParams:
        """The parameters of rollouts, with verl's temperature and length."""
        changes: dict[str, Any] = {
            "temperature": rollout["temperature"],
            "max_tokens": rollout["response_length"],
            "ignore_eos": bool(rollout.get("ignore_eos")),
        }
        if self.alpha_rule is not None:
            changes["alpha_rule"] = self.alpha_rule
        return SamplingParams.preset("rollout", **changes)

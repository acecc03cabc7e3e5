"""What refusals of all trainers share: a sentence with what to change, and how far a rule lets a completion go."""

from __future__ import annotations

from midlogit.core.rules import FixedAlpha, KLBudget
from midlogit.errors import InvalidRequest
from midlogit.params import SamplingParams

SEQUENCE_NATS = (
    1.0  # most KL(q‖base) of a completion for which weights of whole sequences are of use
)


def require(holds: bool, message: str, hint: str) -> None:
    """Raises InvalidRequest unless something holds."""
    if not holds:
        raise InvalidRequest(message, hint)


def most_nats(params: SamplingParams) -> float:
    """The most KL(q‖base) of a completion that the rule guarantees, in nats."""
    rule = params.alpha_rule
    if isinstance(rule, FixedAlpha) and rule.value == 0:
        return 0.0
    return rule.epsilon * params.max_tokens if isinstance(rule, KLBudget) else float("inf")

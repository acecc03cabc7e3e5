"""Rules that choose α for a row, each a formula of α and the cumulant F; knows no rows and no solver.

A new rule needs `spec` and `residual`; everything else has a default that is valid for every rule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from midlogit.core.arrays import Array, array_namespace
from midlogit.core.bounds import Boxes
from midlogit.errors import InvalidRequest
from midlogit.kinds import require_kind


class AlphaRule(ABC):
    """Chooses α in [0, 1] for each row, as the root of an increasing function.

    Attributes:
        kernel_code: the number of the rule in `decide/kernels/layout.py`; None for a rule that the kernels do not have,
            whose rows are decided on arrays.
    """

    kernel_code: ClassVar[int | None] = None

    @property
    @abstractmethod
    def spec(self) -> str:
        """The rule as text, in the form that `parse_rule` reads."""

    @abstractmethod
    def residual(self, alpha: Array, F: Array, dF: Array, d2F: Array) -> tuple[Array, Array]:
        """Value and slope of the function whose root is α; nondecreasing on [0, 1].

        Args:
            alpha: floats or arrays of shape [N], like the other arguments.
            F, dF, d2F: F(α), F′(α) and F″(α) (docs/theory.md (2), (4), (5)).
        """

    @property
    def fixed_alpha(self) -> float | None:
        """The α of every row, for a rule that needs no solver."""
        return None

    @property
    def kernel_parameter(self) -> float:
        """The number in the rule's formula; unused by the kernels where a rule has none."""
        return 0.0

    def certify(self, boxes: Boxes, alpha_N: Array) -> tuple[Array, Array]:
        """Bounds for truncated rows, given the α found for their estimate.

        The default holds for every rule: α and α* are in [0, 1], and a total variation is at most 1.

        Returns:
            (bound on |α − α*|, bound on the total variation between the exact mixtures at α and α*), both [N].
        """
        xp = array_namespace(alpha_N)
        return xp.maximum(alpha_N, 1 - alpha_N), xp.ones_like(alpha_N)


@dataclass(frozen=True, slots=True)
class EqualKL(AlphaRule):
    """The α where KL(q‖base) = KL(q‖teacher) (docs/theory.md (8)): the midpoint q*."""

    kernel_code: ClassVar[int | None] = 0

    @property
    def spec(self) -> str:
        return "equal-kl"

    def residual(self, alpha: Array, F: Array, dF: Array, d2F: Array) -> tuple[Array, Array]:
        return dF, d2F

    def certify(self, boxes: Boxes, alpha_N: Array) -> tuple[Array, Array]:
        return boxes.equal_kl(alpha_N)


@dataclass(frozen=True, slots=True)
class FixedAlpha(AlphaRule):
    """The same α at every token: 0 is the base alone, 1 the teacher alone."""

    value: float
    kernel_code: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        require_kind("float", value=self.value)
        if not 0 <= self.value <= 1:
            raise InvalidRequest(f"fixed α is {self.value}.", "It must lie in [0, 1].")

    @property
    def spec(self) -> str:
        return f"fixed:{_number(self.value)}"

    def residual(self, alpha: Array, F: Array, dF: Array, d2F: Array) -> tuple[Array, Array]:
        return alpha - self.value, 1.0 + 0 * alpha

    @property
    def fixed_alpha(self) -> float:
        return self.value

    @property
    def kernel_parameter(self) -> float:
        return self.value

    def certify(self, boxes: Boxes, alpha_N: Array) -> tuple[Array, Array]:
        xp = array_namespace(alpha_N)
        return xp.zeros_like(alpha_N), xp.zeros_like(alpha_N)


@dataclass(frozen=True, slots=True)
class KLBudget(AlphaRule):
    """The largest α with KL(q‖base) ≤ `epsilon` nats (docs/theory.md (9))."""

    epsilon: float
    kernel_code: ClassVar[int | None] = 2

    def __post_init__(self) -> None:
        require_kind("float", epsilon=self.epsilon)
        if not (self.epsilon >= 0 and math.isfinite(self.epsilon)):
            raise InvalidRequest(
                f"The KL budget is {self.epsilon}.",
                "It must be a finite number of nats, at least 0.",
            )

    @property
    def spec(self) -> str:
        return f"kl-budget:{_number(self.epsilon)}"

    def residual(self, alpha: Array, F: Array, dF: Array, d2F: Array) -> tuple[Array, Array]:
        return alpha * dF - F - self.epsilon, alpha * d2F

    @property
    def kernel_parameter(self) -> float:
        return self.epsilon

    def certify(self, boxes: Boxes, alpha_N: Array) -> tuple[Array, Array]:
        return boxes.kl_budget(alpha_N, self.epsilon)


def _number(x: float) -> str:
    """The shortest text that is read as the same number."""
    return f"{x:g}" if float(f"{x:g}") == x else repr(float(x))


def parse_rule(spec: str) -> AlphaRule:
    """The rule named by `spec`: equal-kl, fixed:ALPHA or kl-budget:NATS.

    Raises:
        InvalidRequest: for any other text.
    """
    name, _, number = spec.partition(":")
    try:
        if name == "equal-kl" and not number:
            return EqualKL()
        if name == "fixed":
            return FixedAlpha(float(number))
        if name == "kl-budget":
            return KLBudget(float(number))
    except InvalidRequest:
        raise
    except ValueError:
        pass
    raise InvalidRequest(
        f"Unknown α rule {spec!r:.80}.",
        "Use equal-kl, fixed:ALPHA (such as fixed:0.5) or kl-budget:NATS (such as kl-budget:0.1).",
    )

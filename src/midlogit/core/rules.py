"""The rules that choose α for a row: equal KL, fixed, KL budget; knows F and its derivatives, no policy.

A rule is one small object. `alpha` maps rows to α; `spec` is its name on the command line.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from midlogit.core.arrays import Array, array_namespace, device
from midlogit.core.bounds import Boxes
from midlogit.core.mixture import LogPair, LoneRow, moments
from midlogit.core.solver import increasing_root
from midlogit.errors import InvalidRequest


class AlphaRule(ABC):
    """Chooses α in [0, 1] for each row."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """The rule as text, as `parse_rule` reads it."""

    @abstractmethod
    def alpha(self, pair: LogPair | LoneRow, tolerance: float) -> Array:
        """α of each row in float64, within `tolerance` (docs/theory.md (11)); every row has a common support.

        A plain number for a LoneRow.
        """

    @abstractmethod
    def certify(self, boxes: Boxes, alpha_N: Array) -> tuple[Array, Array]:
        """Bounds for truncated rows, given the α that `alpha` found for their estimate.

        Returns:
            (bound on |α − α*|, bound on the total variation between the exact mixtures at α and α*).
        """


@dataclass(frozen=True, slots=True)
class EqualKL(AlphaRule):
    """The α where KL(q‖base) = KL(q‖teacher) (docs/theory.md (8)): the midpoint q*."""

    @property
    def spec(self) -> str:
        return "equal-kl"

    def alpha(self, pair: LogPair | LoneRow, tolerance: float) -> Array:
        def slope_of_F(rows: LogPair | LoneRow, alpha_N: Array) -> tuple[Array, Array]:
            _, first_N, second_N = moments(rows, alpha_N)
            return first_N, second_N

        return increasing_root(slope_of_F, pair, tolerance)

    def certify(self, boxes: Boxes, alpha_N: Array) -> tuple[Array, Array]:
        return boxes.equal_kl(alpha_N)


@dataclass(frozen=True, slots=True)
class FixedAlpha(AlphaRule):
    """The same α at every token: 0 is the base alone, 1 the teacher alone."""

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise InvalidRequest(f"fixed α is {self.value}.", "It must lie in [0, 1].")

    @property
    def spec(self) -> str:
        return f"fixed:{self.value:g}"

    def alpha(self, pair: LogPair | LoneRow, tolerance: float) -> Array:
        if isinstance(pair, LoneRow):
            return self.value
        xp = array_namespace(pair.base_NV)
        rows = pair.base_NV.shape[0]
        return xp.full(rows, self.value, dtype=xp.float64, device=device(pair.base_NV))

    def certify(self, boxes: Boxes, alpha_N: Array) -> tuple[Array, Array]:
        xp = array_namespace(alpha_N)
        return xp.zeros_like(alpha_N), xp.zeros_like(alpha_N)


@dataclass(frozen=True, slots=True)
class KLBudget(AlphaRule):
    """The largest α with KL(q‖base) ≤ `epsilon` nats (docs/theory.md (9))."""

    epsilon: float

    def __post_init__(self) -> None:
        if not (self.epsilon >= 0 and math.isfinite(self.epsilon)):
            raise InvalidRequest(f"The KL budget is {self.epsilon}.", "It must be a finite number of nats, at least 0.")

    @property
    def spec(self) -> str:
        return f"kl-budget:{self.epsilon:g}"

    def alpha(self, pair: LogPair | LoneRow, tolerance: float) -> Array:
        def excess(rows: LogPair | LoneRow, alpha_N: Array) -> tuple[Array, Array]:
            value_N, first_N, second_N = moments(rows, alpha_N)
            return alpha_N * first_N - value_N - self.epsilon, alpha_N * second_N

        return increasing_root(excess, pair, tolerance)

    def certify(self, boxes: Boxes, alpha_N: Array) -> tuple[Array, Array]:
        return boxes.kl_budget(alpha_N, self.epsilon)


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
        f"Unknown α rule {spec!r}.",
        "Use equal-kl, fixed:ALPHA (such as fixed:0.5) or kl-budget:NATS (such as kl-budget:0.1).",
    )

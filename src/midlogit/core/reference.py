"""One row at a time in plain float64, to be read beside docs/theory.md; slow, and what the tests compare against.

Shares no code with the fast path: α is found by bisection, the nucleus by sorting, sums by math.fsum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

Row = Sequence[float]

BISECTIONS = 60  # beyond the resolution of float64


@dataclass(frozen=True)
class Mixture:
    """One row's mixture: α, q over the ids, both KLs, entropy, effective sample sizes."""

    alpha: float
    q: list[float]
    p: list[float]
    t: list[float]
    kl_base: float
    kl_teacher: float
    entropy: float
    ess_base: float
    ess_teacher: float


def softmax(logits: Row, temperature: float = 1.0) -> list[float]:
    """(12): probabilities of tempered logits."""
    peak = max(logits)
    mass = [math.exp((x - peak) / temperature) for x in logits]
    total = math.fsum(mass)
    return [m / total for m in mass]


def merge_stops(p: list[float], stop_ids: Sequence[int]) -> list[float]:
    """(14): the stop class in the column of its first id."""
    merged = list(p)
    for i in stop_ids[1:]:
        merged[i] = 0.0
    merged[stop_ids[0]] = math.fsum(p[i] for i in stop_ids)
    return merged


def condition(p: list[float], keep: Collection[int]) -> list[float]:
    """(13), (16): p given that the outcome lies in `keep`."""
    total = math.fsum(p[i] for i in keep)
    if total == 0:
        return [0.0] * len(p)
    return [p[i] / total if i in keep else 0.0 for i in range(len(p))]


def nucleus(t: list[float], top_p: float) -> set[int]:
    """(15): the smallest set of the teacher's most likely outcomes whose mass reaches top_p."""
    chosen: set[int] = set()
    reached = 0.0
    for i in sorted(range(len(t)), key=lambda i: (-t[i], i)):
        if (reached >= top_p and top_p < 1) or t[i] == 0:
            break
        chosen.add(i)
        reached += t[i]
    return chosen


def geometric(p: Row, t: Row, alpha: float) -> tuple[list[float], float]:
    """(1), (2): q_α and F(α)."""
    common = [i for i in range(len(p)) if p[i] > 0 and t[i] > 0]
    exponent = {i: (1 - alpha) * math.log(p[i]) + alpha * math.log(t[i]) for i in common}
    peak = max(exponent.values())
    total = math.fsum(math.exp(e - peak) for e in exponent.values())
    cumulant = peak + math.log(total)
    return [
        math.exp(exponent[i] - cumulant) if i in exponent else 0.0 for i in range(len(p))
    ], cumulant


def kl(q: Row, p: Row) -> float:
    """KL(q‖p) in nats, infinite where q has mass that p has not."""
    return math.fsum(
        math.inf if p[i] == 0 else q[i] * (math.log(q[i]) - math.log(p[i]))
        for i in range(len(q))
        if q[i] > 0
    )


def slope(p: Row, t: Row, alpha: float) -> float:
    """(4): F′(α) = E_q[log t − log p]."""
    q, _ = geometric(p, t, alpha)
    return math.fsum(q[i] * (math.log(t[i]) - math.log(p[i])) for i in range(len(q)) if q[i] > 0)


def increasing_root(f: Callable[[float], float]) -> float:
    """The root of an increasing function on [0, 1], or the nearest end; 0.5 when it is zero at both ends."""
    if abs(f(0)) < 1e-15 and abs(f(1)) < 1e-15:
        return 0.5
    if f(0) >= 0:
        return 0.0
    if f(1) <= 0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2


def equal_kl(p: Row, t: Row) -> float:
    """(8): α with KL(q‖p) = KL(q‖t)."""
    return increasing_root(lambda alpha: slope(p, t, alpha))


def kl_budget(p: Row, t: Row, epsilon: float) -> float:
    """(9): the largest α with KL(q‖p) ≤ ε."""
    if kl(geometric(p, t, 1.0)[0], p) <= epsilon:
        return 1.0
    return increasing_root(lambda alpha: kl(geometric(p, t, alpha)[0], p) - epsilon)


def mixture(
    base_logits: Row,
    teacher_logits: Row,
    *,
    temperature: float = 1.0,
    masked_ids: Collection[int] = (),
    stop_ids: Sequence[int] = (),
    top_p: float | None = None,
    forced: bool = False,
    rule: Callable[[list[float], list[float]], float] = equal_kl,
) -> Mixture:
    """The whole of one decision, in the order of docs/theory.md section 5."""
    p, t = softmax(base_logits, temperature), softmax(teacher_logits, temperature)
    if len(stop_ids) > 1:
        p, t = merge_stops(p, stop_ids), merge_stops(t, stop_ids)
    allowed = set(range(len(p))) - set(masked_ids)
    p, t = condition(p, allowed), condition(t, allowed)
    if top_p is not None:
        support = nucleus(t, top_p)
        p, t = condition(p, support), condition(t, support)
    disjoint = not any(a > 0 and b > 0 for a, b in zip(p, t, strict=True))
    if forced or disjoint:
        alpha, q = 1.0, t
    else:
        alpha = rule(p, t)
        q, _ = geometric(p, t, alpha)
    drawn = [i for i in range(len(q)) if q[i] > 0]
    return Mixture(
        alpha=alpha,
        q=q,
        p=p,
        t=t,
        kl_base=kl(q, p),
        kl_teacher=kl(q, t),
        entropy=-math.fsum(q[i] * math.log(q[i]) for i in drawn),
        ess_base=_ess(q, p, drawn),
        ess_teacher=_ess(q, t, drawn),
    )


def _ess(q: Row, model: Row, drawn: list[int]) -> float:
    """(19): 1 / Σ model² / q over the support of q."""
    total = math.fsum(model[i] ** 2 / q[i] for i in drawn)
    return 1 / total if total > 0 else math.inf

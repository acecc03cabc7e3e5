"""What a sequence asks of its next token, and what is known of it once drawn; knows no rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import AlphaRule
from midlogit.core.uniforms import Chances

# Why nothing was drawn in a row.
BROKEN = "the logits hold NaN or +inf, or nothing but -inf"
EMPTY = "every token is masked"


@dataclass(frozen=True, slots=True)
class Drafted:
    """A token that a server drafted, out of ids that it listed.

    Attributes:
        law: the probability with which it would have drafted each of them, given that it drafts one of them.
    """

    token_id: int
    law: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class RowSettings:
    """What one sequence asks of its next token.

    Attributes:
        rule: how α is chosen. outcomes: the alphabet drawn from.
        temperature: of both models; 0 takes the most likely outcome of q* solved at temperature 1.
        top_p: the teacher's mass that the support must reach, None for no constraint.
        alpha_tol: tolerance of the solver.
        forced: draw from the teacher alone.
        may_end: whether an id that ends the sequence may be drawn.
        chances: the numbers in [0, 1) that decide the draw.
        top_logprobs: how many candidates of q, base and teacher to report.
        given: a token to describe in place of a draw, scored or drawn before; its logprob is −inf where q gives it
            nothing.
        drafted: the base's draft, where its server made it; None to draft here. For listed rows only.
    """

    rule: AlphaRule
    outcomes: Outcomes
    temperature: float
    top_p: float | None
    alpha_tol: float
    forced: bool
    may_end: bool
    chances: Chances
    top_logprobs: int = 0
    given: int | None = None
    drafted: Drafted | None = None


Candidates = list[tuple[int, float]]  # (token id, log-probability), most likely first


@dataclass(frozen=True, slots=True)
class Top:
    """The most likely tokens at one position: under q as sampled, under each model alone (raw)."""

    q: Candidates
    base: Candidates
    teacher: Candidates


@dataclass(frozen=True, slots=True)
class Decision:
    """One drawn token and what is known of it; `error` says why nothing was drawn instead.

    Attributes:
        token_id: the drawn id; for the merged stop class the teacher's most likely stop id.
        logprob: log q of the drawn outcome. base_logprob, teacher_logprob: raw (docs/theory.md (20)).
        forced: drawn from the teacher because the first token is forced.
        fallback: drawn from the teacher because the supports were disjoint.
        constrained: drawn from the teacher's nucleus.
        coverage: mass of the model of which less was seen; 1 for whole rows.
        alpha_bound, bound: certified bounds on |α − α*| and on the total variation between the sampled and
            the exact q* (docs/theory.md (26a), (30)); 0 for whole rows.
        base_bounded, teacher_bounded: whether base_logprob or teacher_logprob is only an upper bound, because the
            server neither listed nor scored the id.
    """

    token_id: int
    alpha: float
    kl_base: float
    kl_teacher: float
    entropy: float
    ess_base: float
    ess_teacher: float
    logprob: float
    base_logprob: float
    teacher_logprob: float
    forced: bool
    fallback: bool
    constrained: bool
    coverage: float = 1.0
    alpha_bound: float = 0.0
    bound: float = 0.0
    base_bounded: bool = False
    teacher_bounded: bool = False
    top: Top | None = None
    error: str | None = None

    @property
    def ess_ratio(self) -> float:
        return self.ess_base / self.ess_teacher if self.ess_teacher else float("inf")

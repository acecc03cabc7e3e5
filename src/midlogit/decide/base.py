"""What a sequence asks of its next token, and what is known of it once drawn; knows no rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import AlphaRule
from midlogit.core.uniforms import TokenUniforms

# Why nothing was drawn in a row.
BROKEN = "the logits hold NaN or +inf, or nothing but -inf"
EMPTY = "every token is masked"


@dataclass(frozen=True, slots=True)
class Draft:
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
        uniforms: the numbers in [0, 1) that decide the draw.
        top_logprobs: how many candidates of q, base and teacher to report.
        given: a token to describe in place of a draw, scored or drawn before; its logprob is −inf where q gives it
            nothing.
        draft: the base's draft, where its server made it; None to draft here. For listed rows only.
    """

    rule: AlphaRule
    outcomes: Outcomes
    temperature: float
    top_p: float | None
    alpha_tol: float
    forced: bool
    may_end: bool
    uniforms: TokenUniforms
    top_logprobs: int = 0
    given: int | None = None
    draft: Draft | None = None

"""The seam of the decision: settings of rows, rows of buffers, deciders; knows no implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from midlogit.core.outcomes import Outcomes
from midlogit.core.rules import AlphaRule
from midlogit.core.uniforms import TokenUniforms
from midlogit.outputs import Decision

if TYPE_CHECKING:
    from torch import Tensor

# Why nothing was drawn for a row.
BROKEN = "the logits hold NaN or +inf, or nothing but -inf"
EMPTY = "every token is masked"


@dataclass(frozen=True, slots=True)
class Draft:
    """A token that a server drafted, out of ids that it listed.

    Attributes:
        probs: the probability with which it drafts each of them, given that it drafts one of them.
    """

    token_id: int
    probs: Mapping[int, float]


@dataclass(slots=True)  # one per token: a frozen one takes three times as long to make
class RowSettings:
    """Settings of one row, for the next token of one sequence.

    Attributes:
        rule: how α is chosen. outcomes: the alphabet drawn from.
        temperature: of both models; 0 takes the most likely outcome of q* solved at temperature 1.
        top_p: the teacher's mass that the support must reach, None for no constraint.
        alpha_tol: tolerance of the solver.
        forced: draw from the teacher alone.
        may_end: whether an id that ends the sequence may be drawn.
        uniforms: the numbers in [0, 1) that decide the draw.
        top_logprobs: how many candidates of q, base and teacher to report.
        given: a token to describe instead of drawing one, scored or drawn before; its logprob is −inf where q gives it
            no mass.
        draft: the base's draft, if its server made one; None to draft here. For truncated rows only.
        return_support: report the ids of the support.
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
    return_support: bool = False


def sampling_key(settings: RowSettings) -> Hashable:
    """The settings that rows must share to be sampled together."""
    s = settings
    of_all = (s.rule, id(s.outcomes), s.top_p is None, s.alpha_tol, s.given is None)
    return (*of_all, s.top_logprobs, s.return_support)


def group_rows(
    settings: Sequence[RowSettings], key: Callable[[RowSettings], Hashable]
) -> list[list[int]]:
    """The numbers of the rows in each group that shares a key."""
    groups: dict[Hashable, list[int]] = {}
    for row, s in enumerate(settings):
        groups.setdefault(key(s), []).append(row)
    return list(groups.values())


class LogitRows(NamedTuple):
    """Some rows of a buffer of raw logits.

    Attributes:
        logits_RV: the buffer, on a torch device.
        rows: which of its rows, N of them.
    """

    logits_RV: Tensor
    rows: Sequence[int]


class BonusRows(NamedTuple):
    """The teacher's rows at the first position of some sequences, known before the base's.

    The round before left them: all of a sequence's drafts were accepted, so that the teacher's logits after the last
    draft are already there.

    Attributes:
        sequences: the numbers of these sequences, M of them.
        logits_MV: the teacher's raw logits.
    """

    sequences: Sequence[int]
    logits_MV: Tensor


class Decided(ABC):
    """The tokens of a number of rows, and on request everything that is known of them."""

    @property
    @abstractmethod
    def tokens_N(self) -> Tensor:
        """The ids to feed to the models next, int64, on the device, for work that is enqueued later.

        They are `token_ids`, except that an id that only one of the models has is replaced: by another member of its
        stop class, or by 0.
        """

    @abstractmethod
    def token_ids(self) -> list[int]:
        """The sampled ids; waits for the device."""

    @abstractmethod
    def decisions(self) -> list[Decision]:
        """The tokens with their diagnostics; waits for the device."""


class DraftRound(ABC):
    """Speculative decoding of N sequences: `draft` until no position is left, then `decide` for all at once."""

    @abstractmethod
    def draft(self, base: LogitRows, bonus: BonusRows | None = None) -> Tensor:
        """Drafts the tokens of the next position of each sequence, or of several.

        Args:
            base: the base's rows, position by position, one per sequence at each.
            bonus: the teacher's rows at the first of these positions, of sequences for which they are known. There the
                token that the decision will give takes the place of the draft.

        Returns:
            A token id for each row, on the device.
        """

    @abstractmethod
    def decide(self, teacher: LogitRows) -> Decided:
        """Decides the tokens of all drafted positions, P of them.

        Args:
            teacher: the teacher's row at the first position of each sequence. The rows of its other positions follow
                directly after it in the buffer.

        Returns:
            P * N results, position by position.
        """


class Decider(ABC):
    """Turns rows of logits and settings into tokens."""

    def warm_up(self, base_1V: Tensor, teacher_1V: Tensor) -> None:  # noqa: B027 - most have nothing to compile
        """Compiles what it needs for rows of the same width and type as these, whose numbers do not matter."""

    @abstractmethod
    def decide(
        self, base: LogitRows, teacher: LogitRows, settings: Sequence[RowSettings]
    ) -> Decided:
        """Decides one token per row pair.

        Args:
            settings: one per row pair.
        """

    @abstractmethod
    def start_round(self, settings: Sequence[RowSettings], num_sequences: int) -> DraftRound:
        """Begins a round of drafts.

        Args:
            settings: of all positions that will be drafted, position by position, `num_sequences` at each.
        """

"""State that one step of the vLLM engine leaves for the next; knows tokens and rows of sequences, runs no model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from midlogit.decide.base import BonusRows, Decided, RowSettings
from midlogit.decide.transfer import HostCopy, to_device
from midlogit.engines.vllm.observer import StepRecord
from midlogit.engines.vllm.steps import ExecutedStep, SampledStep, ScheduledStep
from midlogit.requests.sequence import Positions

# Counts the accepted drafts of each sequence: (drafted_PN, sampled_PN, bonus_sequences) -> [N], on their device.
Accept = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


def num_accepted(drafted_PN: Tensor, sampled_PN: Tensor, bonus_sequences: Sequence[int]) -> Tensor:
    """Counts the accepted drafts [N] of each sequence: those before the first that differs from the sampled token.

    Args:
        drafted_PN, sampled_PN: token ids at P positions of N sequences.
        bonus_sequences: numbers of the sequences whose first token was decided by a bonus row; it equals the sampled
            one by itself.
    """
    return num_alike(drafted_PN, sampled_PN)


def num_alike(one_PN: Tensor, other_PN: Tensor) -> Tensor:
    """Counts the positions [N] of each sequence before the first at which two texts differ."""
    return (one_PN == other_PN).cumprod(0).sum(0)


class RoundPlan(NamedTuple):
    """What a round drafts.

    Attributes:
        num_drafts: γ, 0 in lock-step.
        is_guessed: whether the base reads guesses, all in one forward pass, instead of its drafts one by one.
    """

    num_drafts: int
    is_guessed: bool = False


LOCKSTEP = RoundPlan(0)


@dataclass(slots=True)
class TrackedSequence:
    """A sequence that both cores run, and how many tokens were sampled for it.

    The sequence itself learns of its tokens later, while the device works.
    """

    sequence: Positions
    num_tokens: int = 0

    @property
    def remaining_context(self) -> int:
        """Number of tokens that both contexts hold beyond the sampled ones."""
        return self.sequence.request.max_new_tokens - self.num_tokens

    def settings_at(self, offset: int) -> RowSettings:
        """Sampling settings for the token `offset` positions after the last sampled one."""
        return self.sequence.settings_at(self.num_tokens + offset)

    def advance(self, token_id: int) -> bool:
        """Counts a sampled token; whether it is the last, as far as ids and lengths say.

        Stop strings are found later, when the text is written.
        """
        self.num_tokens += 1
        return self.sequence.ends_with(token_id, self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class Round:
    """The tokens of N sequences, whose decisions are enqueued: one each in lock-step, else up to γ.

    Attributes:
        keys: the sequences.
        num_drafts: γ, 0 in lock-step.
        decided: the tokens, at one position or at γ, N at each.
        decode_only: whether the step decoded all running sequences and did nothing else, so that its time counts.
        bonus_keys: sequences whose first token was decided by a bonus row and is no draft.
        num_accepted: the accepted drafts of each sequence, bonus tokens included; None in lock-step.
        num_valid: the drafts of each sequence that the base made with all tokens before them read, where guesses
            decided how many; None for all of them.
        bonus_logits_NV: the teacher's logits after the last valid draft; None in lock-step.
    """

    keys: list[str]
    num_drafts: int
    decided: Decided
    decode_only: bool
    bonus_keys: Collection[str] = ()
    num_accepted: HostCopy | None = None
    num_valid: HostCopy | None = None
    bonus_logits_NV: Tensor | None = None

    def accepted(self) -> list[int]:
        """The accepted drafts of each sequence, bonus tokens included; waits for the device."""
        return [0] * len(self.keys) if self.num_accepted is None else self.num_accepted.values()

    def valid(self) -> list[int]:
        """The valid drafts of each sequence, or the one token of lock-step; waits for the device."""
        if self.num_valid is None:
            return [max(self.num_drafts, 1)] * len(self.keys)
        return self.num_valid.values()

    def acceptance(self) -> tuple[list[int], list[int]]:
        """The accepted and the verified drafts of each sequence; a bonus token is no draft. Waits for the device."""
        accepted_N, verified_N = [], []
        for key, accepted, valid in zip(self.keys, self.accepted(), self.valid(), strict=True):
            num_bonus = int(key in self.bonus_keys)
            accepted_N.append(max(accepted - num_bonus, 0))
            verified_N.append(min(accepted_N[-1] + 1, valid - num_bonus))
        return accepted_N, verified_N

    def stood(self) -> list[int]:
        """The guesses of each sequence that stood, each of which made a further draft valid; waits for the device.

        Empty in a round without guesses.
        """
        return [] if self.num_valid is None else [valid - 2 for valid in self.valid()]

    def token_ids(self) -> dict[str, list[int]]:
        """The sampled tokens of each sequence: its accepted drafts, and the token that replaces a rejected one.

        Waits for the device.
        """
        sampled, num_sequences = self.decided.token_ids(), len(self.keys)
        counts = zip(self.keys, self.accepted(), self.valid(), strict=True)
        return {
            key: sampled[n : min(accepted + 1, valid) * num_sequences : num_sequences]
            for n, (key, accepted, valid) in enumerate(counts)
        }

    def bonus_rows(self, keys: Sequence[str]) -> BonusRows | None:
        """The teacher's rows after the drafts of this round, for those of `keys` whose drafts were all accepted."""
        if self.bonus_logits_NV is None:
            return None
        counts = zip(self.keys, self.accepted(), self.valid(), strict=True)
        row_of = {key: n for n, (key, accepted, valid) in enumerate(counts) if accepted == valid}
        sequences = [n for n, key in enumerate(keys) if key in row_of]
        if not sequences:
            return None
        rows_M = to_device([row_of[keys[n]] for n in sequences], self.bonus_logits_NV.device)
        return BonusRows(sequences, self.bonus_logits_NV[rows_M])


# Takes a round and the tokens that it gives each of its sequences.
Publish = Callable[[Round, Mapping[str, list[int]]], None]


class Arrived(NamedTuple):
    """The tokens of the step before, now on the host.

    Attributes:
        tokens: of each sequence, up to its last.
        ended: sequences that end by an id or by length; steps that are scheduled already still compute them.
    """

    tokens: Mapping[str, list[int]]
    ended: set[str]


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A step of the pair that the device works on.

    Attributes:
        round: its tokens; None where no sequence was ready on both sides.
        plan: of the next round, where the teacher's step for it is scheduled.
        base_sampled: the base's step, sampled with placeholders; its scheduler is updated once the tokens are known.
        base_executed: the base's next step, which was fed the tokens on the device.
        teacher_executed: the teacher's step, without tokens yet.
        teacher_scheduled: the teacher's next step; None after a round with drafts, because the number of accepted
            drafts decides how much can be scheduled.
    """

    base_executed: ExecutedStep
    base_sampled: SampledStep | None = None
    teacher_executed: ExecutedStep | None = None
    teacher_scheduled: ScheduledStep | None = None
    round: Round | None = None
    plan: RoundPlan = LOCKSTEP


def step_record(
    last: Round | None, arrived: Arrived, time: float, seconds: Mapping[str, float]
) -> StepRecord:
    """Describes a step to an observer.

    Args:
        last: the round before, whose tokens have arrived.
        time, seconds: as of the record.
    """
    num_tokens = sum(map(len, arrived.tokens.values()))
    if last is None:
        return StepRecord(time, 0, 0, num_tokens, 0, 0, seconds)
    return StepRecord(
        time,
        batch_size=len(last.keys),
        num_drafts=last.num_drafts,
        num_tokens=num_tokens,
        num_bonus=len(last.bonus_keys),
        num_stood=sum(last.stood()),
        seconds=seconds,
    )

"""The base's drafts of one round: its forward passes, one by one or over guesses; knows no teacher and no scheduler."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from midlogit.decide.base import BonusRows, DraftRound
from midlogit.decide.transfer import to_device
from midlogit.engines.vllm.core import Core
from midlogit.engines.vllm.guesses import NUM_GUESSES, Guesses
from midlogit.engines.vllm.observer import StepClock
from midlogit.engines.vllm.rounds import RoundPlan, num_alike
from midlogit.engines.vllm.runner import DeviceTokens
from midlogit.engines.vllm.steps import ExecutedStep, SampledStep


class Drafted(NamedTuple):
    """The drafts of N sequences.

    Attributes:
        tokens_PN: token ids.
        num_valid_N: how many of each are valid: the base has read all drafts before them.
        executed: the base's last forward pass.
    """

    tokens_PN: Tensor
    num_valid_N: Tensor
    executed: ExecutedStep


class Drafter:
    """Runs the base ahead of what is decided.

    Args:
        base: the core that drafts. guesses: the texts of its sequences. clock: of the step.
    """

    def __init__(self, base: Core, guesses: Guesses, clock: StepClock) -> None:
        self._base, self._guesses, self._clock = base, guesses, clock

    def draft(
        self,
        draft_round: DraftRound,
        keys: list[str],
        plan: RoundPlan,
        executed: ExecutedStep,
        bonus: BonusRows | None,
    ) -> Drafted:
        """Drafts the tokens of a round; the base reads each draft on the device.

        Args:
            executed: the base's forward pass over the last token of each sequence.
            bonus: the teacher's rows at the first position, where they are known.
        """
        with self._clock.part("decide"):
            first_N = draft_round.draft(self._base.logit_rows(executed, keys), bonus)
        if plan.is_guessed:
            return self._over_guesses(draft_round, keys, executed, first_N)

        drafted = [first_N]
        for _ in range(1, plan.num_drafts):
            _, executed = self.go_on(executed, DeviceTokens(keys, drafted[-1][:, None]))
            with self._clock.part("decide"):
                drafted.append(draft_round.draft(self._base.logit_rows(executed, keys)))
        num_valid_N = torch.full_like(first_N, plan.num_drafts)
        return Drafted(torch.stack(drafted), num_valid_N, executed)

    def _over_guesses(
        self, draft_round: DraftRound, keys: list[str], executed: ExecutedStep, first_N: Tensor
    ) -> Drafted:
        """Drafts after the first draft and the guesses that follow it, in one forward pass.

        A draft is valid as long as the guesses before it are the drafts there.
        """
        guesses_PN = to_device(self._guesses.guesses(keys), self._base.device).T
        read_NQ = torch.cat([first_N[None], guesses_PN]).T
        _, executed = self.go_on(executed, DeviceTokens(keys, read_NQ), NUM_GUESSES)

        with self._clock.part("decide"):
            rows = self._base.logit_rows(executed, keys, num_positions=1 + NUM_GUESSES)
            drafted_PN = draft_round.draft(rows).view(-1, len(keys))
        num_valid_N = 2 + num_alike(guesses_PN, drafted_PN[:-1])
        return Drafted(torch.cat([first_N[None], drafted_PN]), num_valid_N, executed)

    def go_on(
        self, executed: ExecutedStep, tokens: DeviceTokens, num_guesses: int = 0
    ) -> tuple[SampledStep, ExecutedStep]:
        """Enqueues the base's next forward pass over tokens that only the device knows, the guesses last."""
        sampled = self._base.sample_placeholder(executed, tokens.keys)
        return sampled, self._base.execute(self._base.schedule_running(num_guesses), tokens)

"""Two vLLM engine cores in lock-step: each step decides tokens for every sequence that is ready on both sides.

Knows the order of the work and which rows belong together. `Core` knows vLLM, the decider knows α and sampling, the
engine knows threads and texts. With tensor parallelism every rank has one and makes the same calls (ranks.py).

Right after a decision is enqueued, the base's next forward pass is enqueued too and fed the tokens on the device. While
it runs, the tokens reach the host and the teacher's runner, whose forward pass and the next decision are enqueued in
turn. Schedulers are updated and texts written while the device works (docs/vllm.md). A step with drafts has several
forward passes of the base.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from zlib import crc32

import torch

from midlogit.decide.base import Decider, RowSettings
from midlogit.decide.transfer import HostCopy, to_device
from midlogit.engines.draft_length import MAX_DRAFTS, DraftLength
from midlogit.engines.vllm.core import Core
from midlogit.engines.vllm.drafting import Drafter
from midlogit.engines.vllm.guesses import MAX_BATCH, Guesses
from midlogit.engines.vllm.observer import Observer, StepClock
from midlogit.engines.vllm.process import CorePair
from midlogit.engines.vllm.rounds import (
    LOCKSTEP,
    Accept,
    Arrived,
    InFlightStep,
    Publish,
    Round,
    RoundPlan,
    TrackedSequence,
    num_accepted,
    step_record,
)
from midlogit.engines.vllm.runner import DeviceTokens
from midlogit.engines.vllm.scoring import TextScorer
from midlogit.engines.vllm.steps import ExecutedStep, SampledStep
from midlogit.errors import EngineFailure
from midlogit.requests.sequence import Positions


class Lockstep:
    """Two models on one device, in two vLLM engine cores. All calls come from one thread.

    Args:
        cores: base and teacher, on the same device.
        decider: decides rows of logits on that device.
        draft_length: chooses γ among those that the teacher can verify.
        publish: called during a step, while the device works on the next round.

    Attributes:
        scorer: scores given texts in the same steps.
        draft_length: may be replaced between steps.
        uses_guesses: whether rounds may have guesses. Benchmarks turn it off, to measure what they gain.
        accept: counts the accepted drafts of a round. Benchmarks of random weights replace it, to simulate the
            acceptance of a real pair.
        measured: seconds between the last two rounds, where both were undisturbed; for the next `step`.
        checksum: of all rounds so far, their sequences, γ and tokens; the same on every rank.
    """

    def __init__(
        self, cores: CorePair, decider: Decider, draft_length: DraftLength, publish: Publish
    ) -> None:
        self.base, self.teacher = cores.base, cores.teacher
        self._decider, self._publish = decider, publish
        self.draft_length = draft_length
        self.scorer = TextScorer(self.cores, decider)
        self.accept: Accept = num_accepted
        self.uses_guesses = bool(self.base.draft_lengths)

        self._tracked: dict[str, TrackedSequence] = {}
        self._in_flight: InFlightStep | None = None  # None before the base's first step
        self._is_settling = False  # whether no drafts are to be scheduled
        self._arrived_at: float | None = None  # when the last round's tokens were on the host
        self._timed: Round | None = None  # the round that `measured` is the time of
        self.measured: float | None = None
        self.checksum = 0

        self._observer: Observer | None = None
        self.clock = StepClock()
        self._guesses = Guesses()
        self._drafter = Drafter(self.base, self._guesses, self.clock)

    @property
    def cores(self) -> tuple[Core, Core]:
        """The engine cores of base and teacher."""
        return self.base, self.teacher

    @property
    def observer(self) -> Observer | None:
        """Called at the end of every step; for benchmarks and tests, None by default."""
        return self._observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._observer = observer
        for clock in (self.clock, self.base.clock, self.teacher.clock):
            clock.is_on = observer is not None

    def add(self, key: str, sequence: Positions) -> None:
        """Appends a sequence to both waiting queues."""
        request = sequence.request
        self.base.add(key, request.base_ids, request.max_new_tokens)
        self.teacher.add(key, request.teacher_ids, request.max_new_tokens)
        self._tracked[key] = TrackedSequence(sequence)
        self._guesses.add(key, request.base_ids)

    def forget(self, keys: Collection[str]) -> None:
        """Ends sequences and texts, waiting or running, on both sides."""
        for core in self.cores:
            core.abort(keys)
        self.scorer.forget(keys)
        self._guesses.forget([key for key in keys if self._tracked.pop(key, None)])

    def begun(self) -> list[str]:
        """Sequences of which a model has computed something, and texts that are under way."""
        running = self.base.running_keys | self.teacher.running_keys
        begun = [key for key, one in self._tracked.items() if one.num_tokens or key in running]
        return begun + self.scorer.running_keys

    @torch.inference_mode()
    def step(self, seconds: float | None, checksum: int) -> None:
        """Advances every running sequence, starting waiting ones where there is room.

        Args:
            seconds, checksum: `measured` and `checksum` of rank 0 before the step. Only rank 0's times count, so that
                γ is the same on every rank.

        Raises:
            EngineFailure: this rank's sequences or tokens are not those of rank 0.
        """
        start = time.perf_counter()
        self._require_same(checksum)
        self._record_time(seconds)
        previous = self._in_flight or InFlightStep(self.base.execute(self.base.schedule()))
        arrived = self._receive(previous.round)

        plan = previous.plan
        if previous.teacher_scheduled is None:
            # After a round with drafts: what fits now depends on how many were accepted.
            self._update_base(previous, arrived)
            plan = self._plan_round(arrived.ended)

        ready = previous.base_executed.rows
        keys = [key for key in ready if key in self._tracked and key not in arrived.ended]
        if plan.num_drafts and keys:
            self._in_flight = self._speculative_round(previous, arrived, keys, plan)
        else:
            self._in_flight = self._lockstep_round(previous, arrived, keys)

        with self.clock.part("score"):
            self.scorer.step()
        if previous.round is not None:
            with self.clock.part("text"):
                self._publish(previous.round, arrived.tokens)
        if self._observer is not None:
            at = self._arrived_at if previous.round else None
            parts = self._parts(time.perf_counter() - start)
            self._observer(step_record(previous.round, arrived, at or time.perf_counter(), parts))

    @torch.inference_mode()
    def settle(self, checksum: int) -> None:
        """Gives sequences the tokens that are decided, and drops the forward passes that are ahead of them.

        Raises:
            EngineFailure: as `step`.
        """
        self._require_same(checksum)
        ahead = self._in_flight
        if ahead is not None and ahead.teacher_scheduled and ahead.teacher_scheduled.num_drafts:
            self._is_settling = True
            self.step(None, self.checksum)  # the teacher has slots for its drafts already
            self._is_settling = False

        previous, self._in_flight = self._in_flight, None
        if previous is None:
            return
        arrived = self._receive(previous.round)
        teacher_sampled = self._sample_teacher(previous, arrived)
        scheduled_ahead = previous.teacher_scheduled
        teacher = None if scheduled_ahead is None else self.teacher.execute(scheduled_ahead)
        self._update(self.teacher, teacher_sampled, arrived)
        self._update_base(previous, arrived)

        if teacher is not None:
            self.teacher.discard(teacher)
        self.base.discard(previous.base_executed)
        if previous.round is not None:
            with self.clock.part("text"):
                self._publish(previous.round, arrived.tokens)
        self._arrived_at = None

    def _lockstep_round(
        self, previous: InFlightStep, arrived: Arrived, keys: list[str]
    ) -> InFlightStep:
        """Decides one token for each sequence that the teacher is ready for too, and schedules the next step of both.

        Where the teacher's step was scheduled ahead, the schedulers learn of the tokens that arrived while the device
        works.

        Args:
            keys: sequences that are ready on the base's side.
        """
        base, scheduled_ahead = previous.base_executed, previous.teacher_scheduled
        teacher_sampled = self._sample_teacher(previous, arrived)
        if scheduled_ahead is None:
            self._update(self.teacher, teacher_sampled, arrived)
        teacher = self.teacher.execute(scheduled_ahead or self.teacher.schedule())

        keys = [key for key in keys if key in teacher.rows]
        this_round = self._decide(base, teacher, keys) if keys else None
        self.base.defer(base.rows.keys() - teacher.rows.keys())
        self.teacher.defer(teacher.rows.keys() - base.rows.keys())

        if scheduled_ahead is not None:
            self._update_base(previous, arrived)
            self._update(self.teacher, teacher_sampled, arrived)
        plan = self._plan_round()
        base_scheduled = self.base.schedule()
        teacher_scheduled = self.teacher.schedule(plan.num_drafts)

        base_sampled = self.base.sample_placeholder(base, keys)
        tokens = DeviceTokens(keys, this_round.decided.tokens_N[:, None]) if this_round else None
        base_executed = self.base.execute(base_scheduled, tokens)
        return InFlightStep(
            base_executed, base_sampled, teacher, teacher_scheduled, this_round, plan
        )

    def _decide(self, base: ExecutedStep, teacher: ExecutedStep, keys: list[str]) -> Round:
        """Enqueues the decision of one token per sequence."""
        with self.clock.part("decide"):
            rows = self.base.logit_rows(base, keys), self.teacher.logit_rows(teacher, keys)
            decided = self._decider.decide(*rows, self._settings(keys, 1))

        decode_only = (
            len(keys) == len(self._tracked)
            and self.scorer.is_empty
            and base.scheduled.is_decode
            and teacher.scheduled.is_decode
        )
        return Round(keys, 0, decided, decode_only)

    def _speculative_round(
        self, previous: InFlightStep, arrived: Arrived, keys: list[str], plan: RoundPlan
    ) -> InFlightStep:
        """Drafts with the base, verifies all drafts in one forward pass of the teacher, and lets the base go on.

        Args:
            keys: sequences that are ready on the base's side, and on the teacher's as soon as its step is executed.
        """
        if previous.teacher_scheduled is not None:
            self._update_base(previous, arrived)

        # Draft: the base is fed each draft on the device.
        num_drafts = plan.num_drafts
        with self.clock.part("decide"):
            draft_round = self._decider.start_round(self._settings(keys, num_drafts), len(keys))
            bonus = previous.round.bonus_rows(keys) if previous.round else None
        drafted = self._drafter.draft(draft_round, keys, plan, previous.base_executed, bonus)

        # Verify: the teacher learns of the tokens that arrived while the base's last forward pass runs.
        teacher_sampled = self._sample_teacher(previous, arrived)
        self._update(self.teacher, teacher_sampled, arrived)
        teacher_scheduled = previous.teacher_scheduled or self.teacher.schedule(num_drafts)
        teacher = self.teacher.execute(teacher_scheduled, DeviceTokens(keys, drafted.tokens_PN.T))

        with self.clock.part("decide"):
            rows = self.teacher.logit_rows(teacher, keys)
            decided = draft_round.decide(rows)
            bonus_rows_N = to_device(rows.rows, self.teacher.device) + drafted.num_valid_N
            sampled_PN = decided.tokens_N.view(num_drafts, len(keys))
            bonus_sequences = bonus.sequences if bonus else ()
            accepted_N = self.accept(drafted.tokens_PN, sampled_PN, bonus_sequences)
            accepted_N = accepted_N.minimum(drafted.num_valid_N)
            this_round = Round(
                keys,
                num_drafts,
                decided,
                decode_only=True,
                bonus_keys={keys[n] for n in bonus_sequences},
                num_accepted=HostCopy(accepted_N),
                num_valid=HostCopy(drafted.num_valid_N) if plan.is_guessed else None,
                bonus_logits_NV=rows.logits_RV[bonus_rows_N],
            )

        # The base goes on with the last sampled token of each sequence, at a position that only the device knows.
        last_N = accepted_N.minimum(drafted.num_valid_N - 1)
        last_tokens_N1 = sampled_PN.gather(0, last_N[None]).T
        tokens = DeviceTokens(keys, last_tokens_N1, num_rejected_N=num_drafts - 1 - last_N)
        base_sampled, base_executed = self._drafter.go_on(drafted.executed, tokens)
        return InFlightStep(base_executed, base_sampled, teacher, None, this_round)

    def _sample_teacher(self, previous: InFlightStep, arrived: Arrived) -> SampledStep | None:
        """Gives the teacher's runner the tokens of the step before."""
        executed = previous.teacher_executed
        return None if executed is None else self.teacher.sample(executed, arrived.tokens)

    def _update_base(self, previous: InFlightStep, arrived: Arrived) -> None:
        """Replaces the base's placeholders and tells its scheduler."""
        if previous.base_sampled is not None and previous.round is not None:
            num_placeholders = max(previous.round.num_drafts, 1)
            self.base.replace_placeholders(previous.base_sampled, arrived.tokens, num_placeholders)
        self._update(self.base, previous.base_sampled, arrived)

    def _update(self, core: Core, sampled: SampledStep | None, arrived: Arrived) -> None:
        """Tells a scheduler which tokens arrived and which sequences ended."""
        if sampled is not None:
            core.update(sampled)
        core.abort(arrived.ended)

    def _plan_round(self, ended: Collection[str] = ()) -> RoundPlan:
        """Chooses what the next step drafts.

        Args:
            ended: sequences that have ended, which the teacher's scheduler does not know yet.

        Returns:
            Lock-step unless every running sequence needs one token on both sides and the drafts of all fit, and beside
            texts.
        """
        running = self.base.running_keys
        if self._is_settling or not self.scorer.is_empty:
            return LOCKSTEP
        if not running or running != self.teacher.running_keys - set(ended):
            return LOCKSTEP

        keys = [key for key in self._tracked if key in running]
        most = min(self._tracked[key].remaining_context for key in keys) - 1
        fits = len(keys) <= MAX_BATCH and self._can_draft(MAX_DRAFTS, most)
        if self.uses_guesses and fits and self.draft_length.guesses_pay(self._guesses.rates(keys)):
            return RoundPlan(MAX_DRAFTS, is_guessed=True)

        num_drafts = min(self.draft_length.next(len(keys)), most)
        return RoundPlan(num_drafts) if self._can_draft(num_drafts, most) else LOCKSTEP

    def _can_draft(self, num_drafts: int, most: int) -> bool:
        """Whether both sides have room for so many drafts, of which no context holds more than `most`."""
        return 0 < num_drafts <= most and all(core.can_draft(num_drafts) for core in self.cores)

    def _settings(self, keys: list[str], num_positions: int) -> list[RowSettings]:
        """Sampling settings of the sequences at their next positions, position by position."""
        tracked = [self._tracked[key] for key in keys]
        return [one.settings_at(offset) for offset in range(num_positions) for one in tracked]

    def _receive(self, last: Round | None) -> Arrived:
        """Waits for the tokens of the last round and counts them; drops tokens after a sequence's last."""
        if last is None:
            return Arrived({}, set())
        with self.clock.part("wait for the device"):
            tokens = last.token_ids()
        with self.clock.part("counts"):
            self._record_round(last)
            self.checksum = crc32(repr((last.num_drafts, tokens)).encode(), self.checksum)

        ended = set()
        for key, sampled in tokens.items():
            tracked = self._tracked.get(key)
            if tracked is None:
                continue
            for place, token_id in enumerate(sampled):
                if tracked.advance(token_id):
                    ended.add(key)
                    del sampled[place + 1 :]
                    break
            self._guesses.append(key, sampled)
        return Arrived(tokens, ended)

    def _record_round(self, last: Round) -> None:
        """Counts verified and accepted drafts, and the time since the round before."""
        now, before = time.perf_counter(), self._arrived_at
        self._arrived_at = now

        self.draft_length.record_acceptance(last.num_drafts, *last.acceptance(), last.stood())
        if last.decode_only and before is not None:
            self._timed, self.measured = last, now - before

    def _record_time(self, seconds: float | None) -> None:
        """Counts the time of the last round, as rank 0 measured it."""
        timed, self._timed, self.measured = self._timed, None, None
        if timed is not None and seconds is not None:
            self.draft_length.record_time(len(timed.keys), timed.num_drafts, seconds)

    def _require_same(self, checksum: int) -> None:
        if checksum != self.checksum:
            raise EngineFailure(
                "The ranks of the pair have drawn different tokens.", "Open the pair again."
            )

    def _parts(self, step_seconds: float) -> dict[str, float]:
        """The seconds of a step by part."""
        seconds = self.clock.take()
        for side, core in zip(("base", "teacher"), self.cores, strict=True):
            seconds |= {f"{side} {part}": spent for part, spent in core.clock.take().items()}
        seconds["rest of the step"] = step_seconds - sum(seconds.values())
        return seconds

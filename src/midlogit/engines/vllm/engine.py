"""Two vLLM engine cores in lock-step: each step draws for every sequence that is ready on both sides.

Knows the order of the work and which rows belong together; vLLM is behind `Core`, α and the draw behind the policy.
The base's next forward is enqueued behind a draw and fed its tokens on the device; while it runs, they come to the
host and are handed to the teacher, whose forward and the next draw are enqueued in turn. Schedulers are told and texts
written while the device works (docs/vllm.md). A step that drafts has several forwards of the base in it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from midlogit.decide import decider_for
from midlogit.decide.base import BonusRows, Decided, LogitRows, RowSettings
from midlogit.decide.transfer import HostCopy, to_device
from midlogit.engines.base import SteppingEngine
from midlogit.engines.draft_length import DraftLength
from midlogit.engines.vllm.core import Core, Fed, reads_drafts, require_options, require_vllm
from midlogit.engines.vllm.memory import Need, Split, split, split_cpu
from midlogit.errors import InvalidRequest
from midlogit.models.checkpoint import Checkpoint
from midlogit.requests.sequence import Sequence

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16}
DRAFTS = (0, 2, 3, 4, 5, 6)  # γ that "auto" chooses among; the teacher has CUDA graphs for each
SHORTEST_CONTEXT = 2048  # tokens that a cache must hold when no context is asked for

_the_pair = threading.Lock()  # vLLM's CUDA graphs and process groups belong to the process: one pair at a time


@dataclass(slots=True)
class Running:
    """A sequence that both cores know, and how many tokens were drawn for it."""

    sequence: Sequence
    drawn: int = 0

    @property
    def room(self) -> int:
        """How many tokens both contexts hold beyond the drawn ones."""
        return self.sequence.request.max_new_tokens - self.drawn

    def settings_at(self, place: int) -> RowSettings:
        """What the token so many places behind the drawn ones is drawn with; the sequence may not know of them yet."""
        return self.sequence.settings_at(self.drawn + place)

    def ends_with(self, token_id: int) -> bool:
        """Counts a drawn token; whether it is the last, as far as ids and lengths say."""
        self.drawn += 1
        request = self.sequence.request
        return token_id in request.outcomes.ending or self.drawn >= min(
            request.params.max_tokens, request.max_new_tokens
        )


@dataclass(frozen=True, slots=True)
class Flight:
    """A step whose draws are enqueued.

    Attributes:
        keys: its sequences, N of them. drafts: how many tokens were guessed for each.
        alone: whether the step did nothing else, so that its time is that of the draws.
        known: sequences whose first token was drawn before the teacher read it.
        stood: how many of each sequence's guesses were drawn, up to the first that was not; none without drafts.
        behind_NV: the teacher's logits behind the last guesses.
    """

    keys: list[str]
    drafts: int
    decided: Decided
    alone: bool
    known: Collection[str] = ()
    stood: HostCopy | None = None
    behind_NV: Tensor | None = None

    def standing(self) -> list[int]:
        """How many of each sequence's guesses stand; waits for the device."""
        return [0] * len(self.keys) if self.stood is None else self.stood.values()

    def tokens(self) -> dict[str, list[int]]:
        """What was drawn for each sequence: guesses as long as they stand, and the token in the place of one that does
        not; waits for the device."""
        drawn, count = self.decided.token_ids(), len(self.keys)
        stood_N = zip(self.keys, self.standing(), strict=True)
        return {key: drawn[n : (stood + 1) * count : count] for n, (key, stood) in enumerate(stood_N)}

    def known_next(self) -> dict[str, int]:
        """Sequences whose guesses all stand, so that the teacher's row behind them is known; and its number."""
        if not self.drafts:
            return {}
        return {key: n for n, key in enumerate(self.keys) if self.standing()[n] == self.drafts}


def standing(drawn_PN: Tensor, guessed_PN: Tensor) -> Tensor:
    """How many guesses [N] of each sequence were drawn, up to the first that was not."""
    return (drawn_PN == guessed_PN).cumprod(0).sum(0)


class VllmEngine(SteppingEngine[Sequence]):
    """Two models in this process, on one device, behind two vLLM engine cores.

    Args:
        base, teacher: what is known of the models without their weights.
        vocabulary: columns of logits that both share.
        dtype: as vLLM names it; "auto" is the model's own, float32 on the CPU.
        gpu_memory_utilization: share of the device for both together.
        kv_cache_memory_bytes: sizes of the caches of (base, teacher); None splits what is left.
        max_num_seqs: most sequences that run at once. max_model_len: most tokens of one, None for the models' own.
        draft_length: how many tokens to draft ahead.
        options: further EngineArgs of vLLM, for both.

    Raises:
        DoesNotFit: the two models and their caches are larger than the device.
        ModelUnavailable: vLLM cannot run one of the models.
        InvalidRequest: an option or drafts that cannot be honoured, or another pair is open in this process.
        MissingExtra, UnsupportedVersion: no vLLM, or one that is not known.
    """

    def __init__(
        self,
        base: Checkpoint,
        teacher: Checkpoint,
        *,
        vocabulary: int,
        dtype: str,
        gpu_memory_utilization: float,
        kv_cache_memory_bytes: tuple[int, int] | None,
        max_num_seqs: int,
        max_model_len: int | None,
        draft_length: DraftLength,
        options: Mapping[str, Any],
    ) -> None:
        version = require_vllm()
        require_options(options)
        if draft_length.choices and not reads_drafts(version):
            if draft_length.fixed:
                raise InvalidRequest(
                    f"vLLM {version} cannot read drafts on a CPU.", "Use speculation off, or a newer vLLM."
                )
            draft_length = DraftLength("off")
        shares = _split(
            base, teacher, dtype, gpu_memory_utilization, kv_cache_memory_bytes, max_num_seqs, max_model_len,
            max(draft_length.choices, default=0),
        )  # fmt: skip
        common: dict[str, Any] = {
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "options": options,
            "dtype": dtype,
        }
        if not _the_pair.acquire(blocking=False):
            raise InvalidRequest("A vLLM pair is open in this process already.", "Close it, or use another process.")
        self._holds_process = True
        self._cores: list[Core] = []
        try:
            # The larger first, while memory is in one piece.
            for name, cache, share, reads in (
                (teacher.name, shares.teacher_cache, shares.teacher_share, draft_length.choices),
                (base.name, shares.base_cache, shares.base_share, ()),
            ):
                self._cores.insert(0, Core(name, kv_cache_bytes=cache, memory_share=share, reads=reads, **common))
        except BaseException:
            self._close_cores()
            raise
        self._base, self._teacher = self._cores
        self._keys = map(str, itertools.count())
        self._running: dict[str, Running] = {}
        self._in_flight: Flight | None = None
        self._drafts = 0  # of the step that is planned
        self._landed: float | None = None  # when the last flight's tokens were there
        self._decider = decider_for(vocabulary, self._base.device)
        super().__init__(draft_length)

    @property
    def cores(self) -> tuple[Core, Core]:
        """The engine cores of base and teacher."""
        return self._base, self._teacher

    def _run(self) -> None:
        torch.get_num_threads()  # gives this thread torch's OpenMP team, which vLLM's CPU attention counts beforehand
        super()._run()

    def submit(self, sequence: Sequence) -> None:
        self._take([sequence])

    def abort(self, sequences: list[Sequence]) -> None:
        self._drop(sequences)

    def add(self, job: Sequence) -> None:
        request = job.request
        key = next(self._keys)
        self._base.add(key, request.base_ids, request.max_new_tokens)
        self._teacher.add(key, request.teacher_ids, request.max_new_tokens)
        self._running[key] = Running(job)

    def remove(self, job: Sequence) -> None:
        self._leave([key for key, running in self._running.items() if running.sequence is job])

    def close(self) -> None:
        super().close()
        self._close_cores()

    def _close_cores(self) -> None:
        if self._holds_process:
            self._holds_process = False
            while self._cores:
                self._cores.pop().close()
            _the_pair.release()

    @torch.inference_mode()
    def step(self) -> None:
        previous, self._in_flight = self._in_flight, None
        tokens: dict[str, list[int]] = {}
        if previous is not None:
            tokens = previous.tokens()  # waits for the device
            self._measure(previous)
        ended = self._count(tokens)
        # Planned ahead, as behind a single draw: then the schedulers learn of what was drawn while the devices work.
        planned = self._teacher.is_planned
        if not planned:
            self._correct(tokens, ended)
            if not self._base.is_launched:
                self._base.plan()
                self._base.launch()
            self._drafts = self._choose(ended)
        # Sequences that have ended since the step was planned are among its rows.
        keys = [key for key in self._base.ready if key in self._running and key not in ended]
        if self._drafts and keys:
            if planned:
                self._correct(tokens, ended)
            self._draft(previous, keys, tokens, ended)
        else:
            self._draw(keys, tokens, ended, planned)
        if previous is not None:
            self._publish(previous, tokens)

    def _draw(self, keys: list[str], tokens: Mapping[str, list[int]], ended: set[str], planned: bool) -> None:
        """Draws one token for each sequence that the teacher is ready for too, and plans the next step of both.

        Args:
            tokens, ended: of the step before. planned: whether this step was planned before they were known.
        """
        self._teacher.take(tokens)
        if not planned:
            self._tell(self._teacher, ended)
            self._teacher.plan()
        base_rows, teacher_rows = self._base.ready, self._teacher.launch()
        keys = [key for key in keys if key in teacher_rows]
        if keys:
            base = LogitRows(self._base.logits, [base_rows[key] for key in keys])
            teacher = LogitRows(self._teacher.logits, [teacher_rows[key] for key in keys])
            decided = self._decider.decide(base, teacher, self._settings(keys, 1))
            alone = len(keys) == len(self._running) and all(core.computes_one_each for core in self.cores)
            self._in_flight = Flight(keys, 0, decided, alone)
        self._base.hold(base_rows.keys() - teacher_rows.keys())
        self._teacher.hold(teacher_rows.keys() - base_rows.keys())
        if planned:
            self._correct(tokens, ended)
            self._tell(self._teacher, ended)
        self._drafts = self._choose(set())
        self._base.plan()
        self._teacher.plan(self._drafts)
        self._base.go_on(keys)
        self._base.launch(Fed(keys, self._in_flight.decided.tokens_N[:, None]) if self._in_flight else None)

    def _draft(
        self, previous: Flight | None, keys: list[str], tokens: Mapping[str, list[int]], ended: set[str]
    ) -> None:
        """Goes on with the base over its guesses, has the teacher read them all at once, and the base begin anew.

        Args:
            previous, tokens, ended: of the step before, which the teacher learns of while the base's last forward runs.
        """
        drafts = self._drafts
        draft_round = self._decider.start_round(self._settings(keys, drafts), len(keys))
        known = self._known(previous, keys)
        guessed: list[Tensor] = []
        for place in range(drafts):
            if place:
                self._go_on(Fed(keys, guessed[-1][:, None]))
            base = LogitRows(self._base.logits, [self._base.ready[key] for key in keys])
            guessed.append(draft_round.draft(base, None if place else known))
        self._teacher.take(tokens)
        self._tell(self._teacher, ended)
        self._teacher.plan(drafts)  # nothing, if it was planned ahead
        guessed_PN = torch.stack(guessed)
        teacher_rows = self._teacher.launch(Fed(keys, guessed_PN.T))
        decided = draft_round.decide(LogitRows(self._teacher.logits, [teacher_rows[key] for key in keys]))
        behind = to_device([teacher_rows[key] + drafts for key in keys], self._teacher.device)
        drawn_PN = decided.tokens_N.view(drafts, len(keys))
        stood_N = standing(drawn_PN, guessed_PN)
        self._in_flight = Flight(
            keys,
            drafts,
            decided,
            alone=True,
            known={keys[n] for n in known.sequences} if known else (),
            stood=HostCopy(stood_N),
            behind_NV=self._teacher.logits[behind],
        )
        last_N = stood_N.clamp(max=drafts - 1)
        self._go_on(Fed(keys, drawn_PN.gather(0, last_N[None]).T, surplus_N=drafts - 1 - last_N))

    def _go_on(self, fed: Fed) -> None:
        """Enqueues the base's next forward over tokens that only the device knows."""
        self._base.go_on(fed.keys)
        self._base.plan_on()
        self._base.launch(fed)

    def _known(self, previous: Flight | None, keys: list[str]) -> BonusRows | None:
        """The teacher's rows behind some of these sequences, which the round before has left."""
        left = {} if previous is None else previous.known_next()
        numbers = [n for n, key in enumerate(keys) if key in left]
        if previous is None or previous.behind_NV is None or not numbers:
            return None
        return BonusRows(numbers, previous.behind_NV[to_device([left[keys[n]] for n in numbers], self._teacher.device)])

    def _correct(self, tokens: Mapping[str, list[int]], ended: set[str]) -> None:
        """Tells the base's runner and scheduler what was drawn behind the steps that went on."""
        self._base.correct(tokens)
        self._tell(self._base, ended)

    def _tell(self, core: Core, ended: set[str]) -> None:
        """Tells a scheduler what was drawn and what has ended."""
        core.settle()
        core.abort(ended)

    def _choose(self, ended: set[str]) -> int:
        """How many tokens to draft in the next step, or in the one of which the base has begun.

        Args:
            ended: sequences of which the teacher has not been told yet that they ended.
        """
        base, teacher = self.cores
        keys = base.keys
        if not keys or keys != teacher.keys - ended:
            return 0
        drafts = min(self.draft_length.next(len(keys)), min(self._running[key].room for key in keys) - 1)
        return drafts if drafts > 0 and base.can_draft(drafts) and teacher.can_draft(drafts) else 0

    def _measure(self, flight: Flight) -> None:
        """Counts drafts that stood, and the time since the flight before."""
        now, before = time.perf_counter(), self._landed
        self._landed = now
        first_N = [int(key in flight.known) for key in flight.keys]  # a known token is no draft
        stood_N = [max(stood - first, 0) for stood, first in zip(flight.standing(), first_N, strict=True)]
        checked_N = [min(s + 1, flight.drafts - first) for s, first in zip(stood_N, first_N, strict=True)]
        self.draft_length.record_acceptance(flight.drafts, stood_N, checked_N)
        if flight.alone and before is not None:
            self.draft_length.record_time(len(flight.keys), flight.drafts, now - before)

    def _count(self, tokens: dict[str, list[int]]) -> set[str]:
        """Counts the drawn tokens, and drops those behind a last one.

        Returns:
            the keys of sequences that end by an id or by length; stop strings are found when the text is written.
        """
        ended = set()
        for key, drawn in tokens.items():
            running = self._running.get(key)
            for place, token in enumerate(drawn):
                if running is not None and running.ends_with(token):
                    ended.add(key)
                    del drawn[place + 1 :]
                    break
        return ended

    def _settings(self, keys: list[str], places: int) -> list[RowSettings]:
        """The settings of some sequences at their next places, place by place."""
        return [self._running[key].settings_at(place) for place in range(places) for key in keys]

    def _publish(self, flight: Flight, tokens: Mapping[str, list[int]]) -> None:
        """Gives each sequence its tokens, unless it ended since the draw."""
        decisions = flight.decided.decisions()
        for n, key in enumerate(flight.keys):
            running = self._running.get(key)
            if running is not None:
                for decision in decisions[n :: len(flight.keys)][: len(tokens[key])]:
                    if not running.sequence.is_finished:
                        running.sequence.append(decision)
        self._leave([key for key in flight.keys if key in self._running and self._running[key].sequence.is_finished])

    def _leave(self, keys: list[str]) -> None:
        for core in self.cores:
            core.abort(keys)
        for key in keys:
            del self._running[key]


def _split(
    base: Checkpoint,
    teacher: Checkpoint,
    dtype: str,
    utilization: float,
    given: tuple[int, int] | None,
    max_num_seqs: int,
    max_model_len: int | None,
    drafts: int,
) -> Split:
    base_need, teacher_need = (Need.of(c, _dtype_of(c, dtype), max_num_seqs, drafts) for c in (base, teacher))
    if not torch.cuda.is_available():
        return split_cpu(base_need, teacher_need, given)
    free, total = torch.cuda.mem_get_info()
    context = max_model_len or min(base.max_context, teacher.max_context, SHORTEST_CONTEXT)
    return split(base_need, teacher_need, utilization=utilization, context=context, total=total, free=free, given=given)


def _dtype_of(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    own = getattr(checkpoint.config, "dtype", None)
    return DTYPES.get(dtype, own if isinstance(own, torch.dtype) else torch.bfloat16)

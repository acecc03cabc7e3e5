"""Sampling from two servers: sequences request rows from both sides, and all whose rows have come sample together.

Knows sequences, sides and how wide the lists are; text, stops and α belong to the sequences and to `decide`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

from midlogit.core.rejection import num_accepted
from midlogit.decide.base import Draft, RowSettings
from midlogit.engines.draft_length import DraftLength
from midlogit.engines.http.client import CallFailed, Client
from midlogit.engines.http.paired_sides import PairedSides, SlotPair
from midlogit.engines.http.replicas import PendingRow
from midlogit.engines.http.rounds import ListWidth, PendingDrafts, PendingRound
from midlogit.engines.http.rows import DraftRequest, DraftStep
from midlogit.engines.http.sampler import SampledToken, Sampler
from midlogit.engines.http.scoring import ScoringServers
from midlogit.errors import EngineFailure
from midlogit.outputs import ErrorType
from midlogit.requests.sequence import Sequence

log = logging.getLogger("midlogit")

WIDEN = 4  # factor by which an adaptive list grows when its bound is too wide
SHRINK_BELOW = 0.25  # share of the tolerance below which it shrinks again


class HttpEngine(ScoringServers):
    """Two servers, or several replicas of each.

    Args:
        client: in whose loop everything runs; closed with the engine.
        served: what the base's servers were started with, a folder or hub id.
        draft_length: how many tokens the base's server drafts; none while `width` adapts.
        max_num_seqs: most sequences that run at once.
        blocking_text: whether a server makes the sequences' text, so that it must be made off the loop.

    Attributes:
        client, sides: as given.
    """

    def __init__(
        self,
        client: Client,
        sides: PairedSides,
        width: ListWidth,
        draft_length: DraftLength,
        *,
        served: str,
        max_num_seqs: int,
        blocking_text: bool,
    ) -> None:
        super().__init__(client, sides, served, draft_length, max_num_seqs)
        self._width = width
        self._blocking_text = blocking_text
        self._sampler = Sampler(
            client.loop, sides.vocabulary, self._running, at_once=width.tolerance is not None
        )
        self._warned = False

    def submit(self, sequence: Sequence) -> None:
        if self._closed:
            raise EngineFailure("The engine is closed.", "Open the pair again.")
        self.client.loop.call_soon_threadsafe(self._add, sequence)

    def abort(self, sequences: list[Sequence]) -> None:
        if not self._closed:
            self.client.loop.call_soon_threadsafe(
                self._cancel, {id(sequence) for sequence in sequences}
            )

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.client.run(self._abort_all())
            self.client.close()

    def _add(self, sequence: Sequence) -> None:
        if self._is_paused:
            self._held.append(sequence)
            return
        self._waiting.append(sequence)
        self._admit()

    def _admit(self) -> None:
        """Starts waiting sequences while there is room."""
        while self._waiting and len(self._running) < self.max_num_seqs:
            sequence = self._waiting.popleft()
            task = self.client.loop.create_task(self._run(sequence))
            self._running[id(sequence)] = task
            task.add_done_callback(partial(self._remove, sequence))

    def _remove(self, sequence: Sequence, _: asyncio.Task[None]) -> None:
        del self._running[id(sequence)]
        if not sequence.is_finished:  # cancelled before its task had begun
            sequence.abort()
        self._admit()

    def _cancel(self, keys: Collection[int]) -> None:
        for queued in (self._waiting, self._held):
            for sequence in [sequence for sequence in queued if id(sequence) in keys]:
                queued.remove(sequence)
                sequence.abort()

        for key in self._running.keys() & keys:
            self._running[key].cancel()

    async def _abort_all(self) -> None:
        self._cancel({id(sequence) for sequence in (*self._waiting, *self._held)})
        await self._abort_scoring()
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _run(self, sequence: Sequence) -> None:
        """Runs one sequence to its end, whatever ends it."""
        base, teacher = self.sides.base.replicas, self.sides.teacher.replicas
        slots = base.assign(sequence.request.base_ids), teacher.assign(sequence.request.teacher_ids)
        end = sequence.abort
        try:
            await self._generate(sequence, slots)
        except asyncio.CancelledError:
            pass
        except CallFailed as failure:
            where = f"Request {sequence.request.index}, position {len(sequence.token_ids)}"
            error_type: ErrorType = "request" if failure.is_refusal else "engine"
            end = partial(sequence.fail, f"{where}: {failure.message}.", error_type)
        except (
            Exception
        ) as error:  # the engine's own boundary: whoever waits for this sequence must hear of it
            end = partial(sequence.fail, f"The engine failed: {type(error).__name__}: {error}")
        finally:
            base.release(slots[0])
            teacher.release(slots[1])

        if not sequence.is_finished:
            await self._update(end)

    async def _generate(self, sequence: Sequence, slots: SlotPair) -> None:
        """Samples round by round.

        The next round is requested as soon as its prefix is known; decisions and text follow while the servers work.
        """
        k = self._width_of(sequence.request.params.top_logprobs).start
        position = 0
        await self._gate.wait()
        pending = self._start_round(sequence, slots, position, k)
        try:
            while not sequence.is_finished:
                version = pending.weight_version
                if pending.drafts is None:
                    token, k = await self._sample_next(
                        slots, sequence.settings_at(position), pending.rows, k
                    )
                    sampled = [token]
                else:
                    sampled = await self._verify(sequence, slots, position, pending.drafts)
                self._record(pending, position, sampled)
                sequence.weights_changed = self.sides.with_other_weights(slots)
                self._gate.leave(pending)

                token_ids = [token.token_id for token in sampled if token.token_id is not None]
                for slot in slots:
                    slot.prefix += token_ids
                position += len(sampled)
                goes_on = len(token_ids) == len(sampled) and not sequence.ends_with(
                    token_ids[-1], position - 1
                )
                is_early = goes_on and self._gate.is_open
                if is_early:
                    pending = self._start_round(sequence, slots, position, k)

                for token in sampled:
                    await self._update(sequence.append, await token.decision, version)
                    if sequence.is_finished:
                        break
                if goes_on and not is_early and not sequence.is_finished:
                    await self._gate.wait()
                    pending = self._start_round(sequence, slots, position, k)
        finally:
            pending.cancel()  # of no use when a stop string was met
            self._gate.leave(pending)

    def _start_round(
        self, sequence: Sequence, slots: SlotPair, position: int, k: int
    ) -> PendingRound:
        """Requests drafts from the base, or in lock-step a row from each side."""
        rows: tuple[PendingRow, ...] = ()
        drafts: PendingDrafts | None = None
        started, batch = time.perf_counter(), len(self._running)
        num_drafts = self._num_drafts(sequence, position)
        if num_drafts:
            request = DraftRequest.near(
                sequence.request.params.temperature, num_drafts + 1, sequence.draft_seed(position)
            )
            width = self._width_of(sequence.request.params.top_logprobs).drafting
            drafts = PendingDrafts(
                request, self.sides.base.replicas.draft(slots[0], width, request)
            )
        else:
            rows = self.sides.request_top(slots, k)
        return self._gate.enter(PendingRound(started, batch, self.base_version, rows, drafts))

    def _width_of(self, top_logprobs: int) -> ListWidth:
        return self._width.at_least(top_logprobs)

    def _num_drafts(self, sequence: Sequence, position: int) -> int:
        """The draft length of the round at a position.

        0 for the first token, whose round prefills the prompts, and where an automatic draft length would change the
        tokens of a seed.
        """
        params = sequence.request.params
        if position == 0 or (
            params.seed is not None and params.temperature and not self.draft_length.fixed
        ):
            return 0
        return min(
            self.draft_length.next(len(self._running)), sequence.remaining_tokens(position) - 1
        )

    def _record(self, pending: PendingRound, position: int, sampled: list[SampledToken]) -> None:
        """Reports a round's acceptance and time; the first prefills prompts, so its time tells nothing of others."""
        self.draft_length.record_acceptance(pending.num_drafts, [len(sampled) - 1])
        if position and pending.batch.bit_length() == len(self._running).bit_length():
            self.draft_length.record_time(
                pending.batch, pending.num_drafts, time.perf_counter() - pending.started
            )

    async def _verify(
        self, sequence: Sequence, slots: SlotPair, position: int, drafts: PendingDrafts
    ) -> list[SampledToken]:
        """Requests the teacher's rows at all drafts, and samples up to the first rejected one.

        Positions that need no scores are sampled first: if one of them rejects its draft, nothing is scored.
        """
        width = self._width_of(sequence.request.params.top_logprobs)
        asked = drafts.request
        settings = [sequence.settings_at(position + n) for n in range(asked.num_tokens)]
        steps = await drafts.steps
        drafted = self._verifiable(sequence, steps)

        base_rows = [step.row for step in steps[: len(drafted) + 1]]
        settings = [
            replace(row, draft=_draft_of(asked, step))
            for row, step in zip(settings, steps[: len(base_rows)], strict=False)
        ]
        teacher_rows = await self.sides.verify(slots[1], drafted, base_rows, width)
        wide = list(zip(base_rows, teacher_rows, strict=True))

        narrowed = [
            self.sides.narrow(rows, width.start, s) for rows, s in zip(wide, settings, strict=True)
        ]
        pairs, missing = [pair for pair, _ in narrowed], [ids for _, ids in narrowed]
        complete = next((n for n, ids in enumerate(missing) if any(ids)), len(pairs))
        sampled = (
            await self._sampler.sample(pairs[:complete], settings[:complete]) if complete else []
        )
        accepted = num_accepted(drafted, [token.token_id for token in sampled])

        if accepted == complete:
            pairs = await self.sides.with_scores(slots, pairs, missing, drafted)
            sampled += await self._sampler.sample(pairs[complete:], settings[complete:])
            accepted = num_accepted(drafted, [token.token_id for token in sampled])
        return sampled[: accepted + 1]

    def _verifiable(self, sequence: Sequence, steps: list[DraftStep]) -> list[int]:
        """The drafts before the first that ends the sequence, may not be sampled or is missing from its list.

        The last step's token is left out: no row follows it.
        """
        masked = sequence.request.outcomes.masked_before_end
        drafted: list[int] = []
        for row, token_id in steps[:-1]:
            if token_id not in row or token_id in masked or token_id >= self.sides.vocabulary:
                break
            drafted.append(token_id)
        return drafted

    async def _sample_next(
        self, slots: SlotPair, settings: RowSettings, rows: tuple[PendingRow, ...], k: int
    ) -> tuple[SampledToken, int]:
        """The next token in lock-step, and the width with which to begin the one after it."""
        width = self._width_of(settings.top_logprobs)
        while True:
            pairs = [await self.sides.read_top(rows)]
            missing = self.sides.missing_ids(pairs[0], settings)
            if any(missing):
                pairs = await self.sides.with_scores(slots, pairs, [missing])
            token = (await self._sampler.sample(pairs, [settings]))[0]
            if width.tolerance is None:
                return token, k

            tv_bound = (await token.decision).tv_bound
            if tv_bound <= width.tolerance or k >= width.maximum:
                break
            k = min(WIDEN * k, width.maximum)
            rows = self.sides.request_top(slots, k)

        if tv_bound > width.tolerance:
            self._warn(width.tolerance)
        elif tv_bound <= SHRINK_BELOW * width.tolerance:
            k = max(k // 2, width.start)
        return token, k

    async def _update(self, call: Callable[..., None], *arguments: Any) -> None:
        """Makes a call that decodes text: here, or in another thread when a server decodes it."""
        if not self._blocking_text:
            call(*arguments)
            return

        work = self.client.loop.run_in_executor(None, call, *arguments)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await work  # nobody else may touch the sequence before
            raise

    def _warn(self, tolerance: float) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "top_k='auto': some bounds stay above the tolerance of %g with the %d log-probabilities that the "
                "servers allow; start them with a higher --max-logprobs. Each token's bound is in its diagnostics.",
                tolerance,
                self._width.maximum,
            )


def _draft_of(request: DraftRequest, step: DraftStep) -> Draft | None:
    """The base's draft with the distribution it was sampled from.

    None where decide drafts anew from the list: at temperature 0, and for a token outside the list.
    """
    if not request.temperature or step.token_id not in step.row:
        return None
    return Draft(step.token_id, request.probs(step.row))

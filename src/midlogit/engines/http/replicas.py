"""The replicas of one model: batches row requests into calls, retries, and moves sequences off failed replicas.

Knows prefixes and replicas; not what the rows are for, nor that there is another side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from midlogit.engines.http import rows, verification
from midlogit.engines.http.client import CallFailed, Client, Endpoint
from midlogit.engines.http.handshake import ServerFacts
from midlogit.engines.http.weight_watch import WeightWatch

MAX_CALLS = (
    4  # row calls in flight per replica: a long prompt holds up its own call, not the others
)
MAX_ROWS = 256  # prompts per call
MAX_SPAN_CALLS = (
    64  # calls for spans in flight per replica: spans share no call, so the server batches them
)
COOL_DOWN = 5.0  # seconds for which a failed replica is avoided while another is up


@dataclass(eq=False, slots=True)
class Replica:
    """One server of the model, the requests that wait for it, and its state.

    Attributes:
        waiting: requests that no call carries yet.
        row_calls, span_calls: calls in flight.
        is_scoring: whether the calls in flight score chosen ids. Calls of both kinds are never in flight together:
            vLLM corrupts the top-k lists of requests batched with a `logprob_token_ids` request.
        num_slots: sequences assigned to it.
        is_flush_scheduled: whether `waiting` is sent at the end of this turn of the loop.
        down_until: monotonic time before which it is avoided.
    """

    facts: ServerFacts
    weights: WeightWatch
    waiting: list[RowRequest] = field(default_factory=list)
    row_calls: int = 0
    span_calls: int = 0
    is_scoring: bool = False
    num_slots: int = 0
    is_flush_scheduled: bool = False
    down_until: float = 0.0

    @property
    def endpoint(self) -> Endpoint:
        return self.facts.endpoint


@dataclass(eq=False, slots=True)
class Slot:
    """A sequence's sticky routing: the replica whose prefix cache holds it, and its tokens so far.

    Attributes:
        is_new: whether no row has been computed yet, so that the first has a prompt to prefill.
        is_released: whether the sequence has ended.
        has_other_weights: whether a row of it came from a replica with other weights than it should have.
    """

    replica: Replica
    prefix: list[int]
    is_new: bool = True
    is_released: bool = False
    has_other_weights: bool = False

    def has_room_for(self, num_tokens: int) -> bool:
        """Whether so many tokens fit into its server's context after the prefix."""
        return len(self.prefix) + num_tokens <= self.replica.facts.max_context


@dataclass(eq=False, slots=True)
class RowRequest:
    """The next row after a prefix.

    Attributes:
        k: how many of the most likely ids; 0 for the scores of `ids` instead.
        span: rows along one sequence, in a call of their own: tokens to draft or drafts to verify, each with its own
            list of `k` ids; None for one row.
        answer: what a reader of `rows` or `verification` makes of the server's answer.
    """

    slot: Slot
    prefix: Sequence[int]
    k: int
    ids: tuple[int, ...]
    span: rows.DraftRequest | verification.VerifyRequest | None
    answer: asyncio.Future[Any]

    @property
    def is_wanted(self) -> bool:
        """Whether somebody still waits for the answer."""
        return not (self.answer.done() or self.slot.is_released)


PendingRow = asyncio.Future[dict[int, float]]  # log-probability by id


class ReplicaPool:
    """Rows of one model, from whichever of its servers; lives in the client's loop.

    Args:
        servers: the facts of each replica.

    Attributes:
        max_calls, max_rows: row calls in flight per replica, prompts per call.
    """

    def __init__(self, client: Client, servers: Sequence[ServerFacts]) -> None:
        self.replicas = [Replica(facts, WeightWatch(client, facts)) for facts in servers]
        self.max_calls = MAX_CALLS
        self.max_rows = MAX_ROWS
        self._client = client
        self._tasks: set[asyncio.Task[None]] = set()

    def assign(self, prompt: Sequence[int]) -> Slot:
        """A slot for a new sequence, at the replica with the fewest."""
        replica = min(self._up() or self.replicas, key=lambda replica: replica.num_slots)
        replica.num_slots += 1
        return Slot(replica, list(prompt))

    def release(self, slot: Slot) -> None:
        """Gives a slot back; what was requested for it is not called for again."""
        slot.is_released = True
        slot.replica.num_slots -= 1

    def expect_new_weights(self) -> None:
        """Takes the weights that the replicas have at their next calls for those that they should have."""
        for replica in self.replicas:
            replica.weights.expect_new()

    def top(self, slot: Slot, k: int, drafted: Sequence[int] = ()) -> list[PendingRow]:
        """The `k` most likely ids after the slot's prefix, and after each of the drafted tokens appended to it."""
        new_future = self._client.loop.create_future
        prefixes = _prefixes(slot, drafted)
        return self._enqueue(
            slot, [RowRequest(slot, prefix, k, (), None, new_future()) for prefix in prefixes]
        )

    def score(
        self, slot: Slot, ids_of_rows: Sequence[Sequence[int]], drafted: Sequence[int] = ()
    ) -> list[list[PendingRow]]:
        """Log-probabilities of chosen ids after each prefix of `top`, in parts of at most MAX_SCORED ids."""
        new_future = self._client.loop.create_future
        requests = [
            [
                RowRequest(
                    slot, prefix, 0, tuple(ids[at : at + rows.MAX_SCORED]), None, new_future()
                )
                for at in range(0, len(ids), rows.MAX_SCORED)
            ]
            for prefix, ids in zip(_prefixes(slot, drafted), ids_of_rows, strict=True)
        ]
        self._enqueue(slot, [request for parts in requests for request in parts])
        return [[request.answer for request in parts] for parts in requests]

    def draft(
        self, slot: Slot, k: int, drafts: rows.DraftRequest
    ) -> asyncio.Future[list[rows.DraftStep]]:
        """Drafts after the slot's prefix, each with the `k` most likely ids there."""
        request = RowRequest(
            slot, list(slot.prefix), k, (), drafts, self._client.loop.create_future()
        )
        return self._enqueue(slot, [request])[0]

    def verify(
        self, slot: Slot, k: int, drafts: verification.VerifyRequest
    ) -> asyncio.Future[list[dict[int, float]] | None]:
        """The rows of `top` after the drafted tokens, with scores of chosen ids, as one sequence.

        None where the server's prefix cache hides some of them.
        """
        request = RowRequest(
            slot, list(slot.prefix), k, (), drafts, self._client.loop.create_future()
        )
        return self._enqueue(slot, [request])[0]

    def _enqueue(self, slot: Slot, requests: list[RowRequest]) -> list[asyncio.Future[Any]]:
        slot.replica.waiting += requests
        self._schedule_flush(slot.replica)
        return [request.answer for request in requests]

    def _schedule_flush(self, replica: Replica) -> None:
        """Sends what waits once every sequence that is ready now has made its requests, so that they share a call.

        With a single sequence there is nothing to share: its requests go at once.
        """
        if replica.waiting and not replica.is_flush_scheduled:
            if replica.num_slots == 1:
                self._flush(replica)
            else:
                replica.is_flush_scheduled = True
                self._client.loop.call_soon(self._flush, replica)

    def _flush(self, replica: Replica) -> None:
        replica.is_flush_scheduled = False
        while requests := self._next_call(replica):
            if requests[0].span is None:
                replica.row_calls += 1
            else:
                replica.span_calls += 1
            replica.is_scoring = requests[0].k == 0

            task = self._client.loop.create_task(self._send(replica, requests))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next_call(self, replica: Replica) -> list[RowRequest]:
        """Takes waiting requests that can share a call: the same k, or chosen ids that fit into one list.

        First rows have prompts to prefill, so they share no call with others. Spans share no call at all.
        """
        replica.waiting = [request for request in replica.waiting if request.is_wanted]
        if not replica.waiting:
            return []

        oldest = replica.waiting[0]
        if (replica.row_calls or replica.span_calls) and (oldest.k == 0) != replica.is_scoring:
            return []
        if oldest.span is not None:
            return [replica.waiting.pop(0)] if replica.span_calls < MAX_SPAN_CALLS else []
        if replica.row_calls >= self.max_calls:
            return []

        taken: list[RowRequest] = []
        left: list[RowRequest] = []
        scored: set[int] = set()
        for request in replica.waiting:
            is_alike = (
                request.k == oldest.k
                and request.slot.is_new == oldest.slot.is_new
                and request.span is None
            )
            if (
                is_alike
                and len(taken) < self.max_rows
                and len(scored | set(request.ids)) <= rows.MAX_SCORED
            ):
                taken.append(request)
                scored |= set(request.ids)
            else:
                left.append(request)
        replica.waiting = left
        return taken

    async def _send(self, replica: Replica, requests: list[RowRequest]) -> None:
        """Makes one call and hands its rows to the requests."""
        try:
            await self._call_with_retries(requests)
        except CallFailed as failure:
            may_concern_one = not failure.retryable or failure.is_broken_answer
            if len(requests) > 1 and may_concern_one:
                await asyncio.gather(*(self._send_alone(request) for request in requests))
            else:
                _fail(requests, failure)
        except Exception as error:  # whoever waits for these rows must hear of it
            message = f"{replica.endpoint.name}: {type(error).__name__}: {error}"
            _fail(requests, CallFailed(message, retryable=False))
        finally:
            if requests[0].span is None:
                replica.row_calls -= 1
            else:
                replica.span_calls -= 1
            self._schedule_flush(replica)

    async def _send_alone(self, request: RowRequest) -> None:
        """Repeats one request of a failed call by itself, so that only the request at fault fails."""
        try:
            await self._call_with_retries([request])
        except CallFailed as failure:
            _fail([request], failure)

    async def _call_with_retries(self, requests: list[RowRequest]) -> None:
        """Calls until there is an answer, moving to another replica when one fails; stops when nobody waits for it.

        Raises:
            CallFailed: the last failure, when nothing is left to try; its message names side and URL.
        """
        attempt = 0
        while wanted := [request for request in requests if request.is_wanted]:
            replica = wanted[0].slot.replica
            try:
                answers = await self._call_once(replica, wanted, is_retry=attempt > 0)
            except CallFailed as failure:
                if (
                    not failure.retryable
                    or attempt == self._client.retries + len(self.replicas) - 1
                ):
                    attempts = f" ({attempt + 1} attempts)" if attempt else ""
                    message = f"{replica.endpoint.name}: {failure.message}{attempts}"
                    raise CallFailed(
                        message, status=failure.status, retryable=failure.retryable
                    ) from failure

                next_replica = await self._replica_for_retry(replica, failure, attempt)
                for request in wanted:
                    self._move(request.slot, next_replica)
                attempt += 1
            else:
                replica.down_until = 0.0
                replica.weights.note_answer()
                for request, answer in zip(wanted, answers, strict=True):
                    request.slot.is_new = False
                    request.slot.has_other_weights |= replica.weights.found_others
                    _resolve(request, answer)
                return

    async def _replica_for_retry(
        self, replica: Replica, failure: CallFailed, attempt: int
    ) -> Replica:
        """The replica for the next attempt: another one that is up, at once; else any, after a wait.

        A replica that is healthy all the same keeps its sequences.
        """
        chosen = replica
        if not failure.healthy:
            replica.down_until = monotonic() + COOL_DOWN
            if failure.status is None or failure.status >= 500:
                replica.weights.note_failure()
            if up := self._up():
                return min(up, key=lambda other: other.num_slots)
            chosen = self.replicas[(self.replicas.index(replica) + 1) % len(self.replicas)]

        await asyncio.sleep(self._client.backoff(max(0, attempt - len(self.replicas) + 1), failure))
        return chosen

    async def _call_once(
        self, replica: Replica, requests: list[RowRequest], *, is_retry: bool
    ) -> list[Any]:
        """Makes one attempt; where the replica's weights must be checked, their rows are not used before they are."""
        prompts = [request.prefix for request in requests]
        k, span = requests[0].k, requests[0].span
        ids = sorted({i for request in requests for i in request.ids})

        model, path = replica.facts.model, "/completions"
        read: Callable[[Any, dict[str, Any], rows.Form], Any]
        if isinstance(span, verification.VerifyRequest):
            path = verification.PATH
            body = verification.verify_body(model, prompts[0], k, span)
            read = verification.read_verified
        elif span is not None:
            body, read = rows.draft_body(model, prompts[0], k, span), rows.read_drafts
        elif k:
            body, read = rows.top_body(model, prompts, k), rows.read_top
        else:
            body, read = rows.score_body(model, prompts, ids), rows.read_scores

        call = self._client.call_once(
            replica.endpoint,
            path,
            body,
            lambda answer: read(answer, body, replica.facts.form),
            fresh=is_retry,
        )
        if k and replica.weights.is_due:  # not while chosen ids are scored: see Replica.is_scoring
            answer, _ = await asyncio.gather(call, replica.weights.check())
        else:
            answer = await call
        return [answer] if span is not None else list(answer)

    def _up(self) -> list[Replica]:
        """Replicas that have not failed recently."""
        now = monotonic()
        return [replica for replica in self.replicas if replica.down_until <= now]

    def _move(self, slot: Slot, replica: Replica) -> None:
        if slot.is_released:
            return
        slot.replica.num_slots -= 1
        replica.num_slots += 1
        slot.replica = replica


def _prefixes(slot: Slot, drafted: Sequence[int]) -> list[list[int]]:
    """The slot's prefix, and the prefix after each drafted token."""
    return [[*slot.prefix, *drafted[:n]] for n in range(1 + len(drafted))]


def _resolve(request: RowRequest, row: Any) -> None:
    if not request.answer.done():
        request.answer.set_result(row if request.k else {i: row[i] for i in request.ids})


def _fail(requests: Sequence[RowRequest], failure: CallFailed) -> None:
    for request in requests:
        if not request.answer.done():
            request.answer.set_exception(failure)
            # Retrieved, so that asyncio does not complain where nobody waits for it any more.
            request.answer.exception()

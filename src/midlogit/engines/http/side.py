"""One side of the pair: its replicas, and the calls that gather the rows its sequences ask for.

Knows prefixes and replicas; not what the rows are for, nor that there is another side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from midlogit.engines.http.client import CallFailed, Client, Endpoint
from midlogit.engines.http.rows import (
    MAX_SCORED,
    Drafts,
    Step,
    draft_body,
    read_drafts,
    read_scores,
    read_top,
    score_body,
    top_body,
)

MAX_CALLS = 4  # row calls in flight to one replica: a long prompt holds up its own call, not the others
MAX_ROWS = 256  # prompts of one call
MAX_DRAFTING = 64  # draft calls in flight to one replica: they cannot be gathered, the server batches them
COOL_DOWN = 10.0  # seconds for which a replica that failed is passed over while another is there


@dataclass(eq=False, slots=True)
class Replica:
    """One server of the side, what waits for it and how it fares.

    `calls` and `drafting` count its calls in flight, gathered ones and those for drafts. `scoring` tells their
    kind, never of both kinds: vLLM spoils the top-K lists of a batch in which it scores chosen ids.
    """

    endpoint: Endpoint
    model: str
    waiting: list[Ask] = field(default_factory=list)
    calls: int = 0
    draft_length: int = 0
    scoring: bool = False
    seats: int = 0
    flushing: bool = False
    down_until: float = 0.0


@dataclass(eq=False, slots=True)
class Seat:
    """A sequence's place: the replica whose prefix cache knows it, and its tokens so far."""

    replica: Replica
    prefix: list[int]
    fresh: bool = True


@dataclass(eq=False, slots=True)
class Ask:
    """What is wanted behind a prefix: the `k` most likely ids, with drafts or without; scores of `ids` when k is 0."""

    seat: Seat
    prefix: Sequence[int]
    k: int
    ids: tuple[int, ...]
    drafts: Drafts | None
    answer: asyncio.Future[Any]


Row = asyncio.Future[dict[int, float]]


class Side:
    """Rows of one model, from whichever of its servers; lives in the client's loop.

    Args:
        servers: (endpoint, name of the model there) of each replica.
    """

    def __init__(self, client: Client, servers: Sequence[tuple[Endpoint, str]]) -> None:
        self.replicas = [Replica(server, model) for server, model in servers]
        self.max_calls = MAX_CALLS
        self.max_rows = MAX_ROWS
        self._client = client
        self._tasks: set[asyncio.Task[None]] = set()

    def sit(self, prompt: Sequence[int]) -> Seat:
        """A place for a new sequence at the replica with the fewest."""
        replica = min(self._living() or self.replicas, key=lambda replica: replica.seats)
        replica.seats += 1
        return Seat(replica, list(prompt))

    def leave(self, seat: Seat) -> None:
        seat.replica.seats -= 1

    def top(self, seat: Seat, k: int, drafted: Sequence[int] = ()) -> list[Row]:
        """The `k` most likely ids behind the seat's prefix, and behind it with each further drafted token."""
        future = self._client.loop.create_future
        return self._ask(seat, [Ask(seat, prefix, k, (), None, future()) for prefix in _growing(seat, drafted)])

    def score(self, seat: Seat, wanted: Sequence[Sequence[int]], drafted: Sequence[int] = ()) -> list[list[Row]]:
        """Log-probabilities of chosen ids behind each of the prefixes of `top`, in as many parts as a call takes."""
        future = self._client.loop.create_future
        asks = [
            [
                Ask(seat, prefix, 0, tuple(ids[at : at + MAX_SCORED]), None, future())
                for at in range(0, len(ids), MAX_SCORED)
            ]
            for prefix, ids in zip(_growing(seat, drafted), wanted, strict=True)
        ]
        self._ask(seat, [ask for parts in asks for ask in parts])
        return [[ask.answer for ask in parts] for parts in asks]

    def draft(self, seat: Seat, k: int, drafts: Drafts) -> asyncio.Future[list[Step]]:
        """Drafts behind the seat's prefix, each with the `k` most likely ids there."""
        return self._ask(seat, [Ask(seat, seat.prefix, k, (), drafts, self._client.loop.create_future())])[0]

    def _ask(self, seat: Seat, asks: list[Ask]) -> list[asyncio.Future[Any]]:
        seat.replica.waiting += asks
        self._wake(seat.replica)
        return [ask.answer for ask in asks]

    def _wake(self, replica: Replica) -> None:
        """Sends what waits after every sequence that is ready now has asked: rows gather, a lone one goes at once."""
        if replica.waiting and not replica.flushing:
            if replica.seats == 1:
                self._flush(replica)
            else:
                replica.flushing = True
                self._client.loop.call_soon(self._flush, replica)

    def _flush(self, replica: Replica) -> None:
        replica.flushing = False
        while asks := self._next_call(replica):
            if asks[0].drafts is None:
                replica.calls += 1
            else:
                replica.draft_length += 1
            replica.scoring = asks[0].k == 0
            task = self._client.loop.create_task(self._carry(replica, asks))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next_call(self, replica: Replica) -> list[Ask]:
        """Takes waiting asks that can share a call: the same K, or chosen ids that fit into one list.

        First rows have prompts to read, so they do not hold up the others. Drafts share no call.
        """
        replica.waiting = [ask for ask in replica.waiting if not ask.answer.done()]
        if not replica.waiting:
            return []
        oldest = replica.waiting[0]
        if (replica.calls or replica.draft_length) and (oldest.k == 0) != replica.scoring:
            return []
        if oldest.drafts is not None:
            return [replica.waiting.pop(0)] if replica.draft_length < MAX_DRAFTING else []
        if replica.calls >= self.max_calls:
            return []
        taken: list[Ask] = []
        left: list[Ask] = []
        scored: set[int] = set()
        for ask in replica.waiting:
            alike = ask.k == oldest.k and ask.seat.fresh == oldest.seat.fresh and ask.drafts is None
            if alike and len(taken) < self.max_rows and len(scored | set(ask.ids)) <= MAX_SCORED:
                taken.append(ask)
                scored |= set(ask.ids)
            else:
                left.append(ask)
        replica.waiting = left
        return taken

    async def _carry(self, replica: Replica, asks: list[Ask]) -> None:
        """Brings the answers of one call to those who asked."""
        try:
            rows = await self._persist(asks)
        except CallFailed as failure:
            if len(asks) > 1 and not failure.retryable:
                await asyncio.gather(*(self._carry_alone(ask) for ask in asks))
            else:
                for ask in asks:
                    _refuse(ask, failure)
        except Exception as error:  # whoever waits for these rows must hear of it
            for ask in asks:
                _refuse(ask, CallFailed(f"{replica.endpoint.name}: {type(error).__name__}: {error}", retryable=False))
        else:
            for ask, row in zip(asks, rows, strict=True):
                ask.seat.fresh = False
                _answer(ask, row)
        finally:
            if asks[0].drafts is None:
                replica.calls -= 1
            else:
                replica.draft_length -= 1
            self._wake(replica)

    async def _carry_alone(self, ask: Ask) -> None:
        """One ask of a call that was refused: only the one at fault shall fail."""
        try:
            row = (await self._persist([ask]))[0]
        except CallFailed as failure:
            _refuse(ask, failure)
        else:
            _answer(ask, row)

    async def _persist(self, asks: list[Ask]) -> list[Any]:
        """Calls until there is an answer, moving to another replica when one fails.

        Raises:
            CallFailed: the last failure, when nothing is left to try; its message names side and URL.
        """
        attempt = 0
        while True:
            replica = asks[0].seat.replica
            try:
                rows = await self._call(replica, asks)
            except CallFailed as failure:
                if not failure.retryable or attempt == self._client.retries + len(self.replicas) - 1:
                    tries = f" ({attempt + 1} attempts)" if attempt else ""
                    message = f"{replica.endpoint.name}: {failure.message}{tries}"
                    raise CallFailed(message, status=failure.status, retryable=failure.retryable) from failure
                refuge = await self._refuge(replica, failure, attempt)
                for ask in asks:
                    self._move(ask.seat, refuge)
                attempt += 1
            else:
                replica.down_until = 0.0
                return rows

    async def _refuge(self, replica: Replica, failure: CallFailed, attempt: int) -> Replica:
        """Where to try again: at once where another replica lives, else after a wait; a healthy one keeps its own."""
        again = replica
        if not failure.healthy:
            replica.down_until = monotonic() + COOL_DOWN
            if living := self._living():
                return min(living, key=lambda other: other.seats)
            again = self.replicas[(self.replicas.index(replica) + 1) % len(self.replicas)]
        await asyncio.sleep(self._client.wait(max(0, attempt - len(self.replicas) + 1), failure))
        return again

    async def _call(self, replica: Replica, asks: list[Ask]) -> list[Any]:
        prompts, k, drafts = [ask.prefix for ask in asks], asks[0].k, asks[0].drafts
        ids = sorted({i for ask in asks for i in ask.ids})
        if drafts is not None:
            body = draft_body(replica.model, prompts[0], k, drafts)
        elif k:
            body = top_body(replica.model, prompts, k)
        else:
            body = score_body(replica.model, prompts, ids)
        answer = await self._client.once(replica.endpoint, "/completions", body)
        if drafts is not None:
            return [read_drafts(answer, drafts, k)]
        return read_top(answer, len(asks), k) if k else read_scores(answer, len(asks), ids)

    def _living(self) -> list[Replica]:
        now = monotonic()
        return [replica for replica in self.replicas if replica.down_until <= now]

    def _move(self, seat: Seat, replica: Replica) -> None:
        seat.replica.seats -= 1
        replica.seats += 1
        seat.replica = replica


def _growing(seat: Seat, drafted: Sequence[int]) -> list[list[int]]:
    """The seat's prefix, and with each further drafted token."""
    return [seat.prefix, *([*seat.prefix, *drafted[: n + 1]] for n in range(len(drafted)))]


def _answer(ask: Ask, row: Any) -> None:
    if not ask.answer.done():
        ask.answer.set_result(row if ask.k else {i: row[i] for i in ask.ids})


def _refuse(ask: Ask, failure: CallFailed) -> None:
    if not ask.answer.done():
        ask.answer.set_exception(failure)
        ask.answer.exception()  # whoever waits learns of it; where nobody does any more, asyncio need not complain

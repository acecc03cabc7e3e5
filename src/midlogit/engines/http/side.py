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
from midlogit.engines.http.rows import MAX_SCORED, read_scores, read_top, score_body, top_body

MAX_CALLS = 4  # row calls in flight to one replica: a long prompt holds up its own call, not the others
MAX_ROWS = 256  # prompts of one call
COOL_DOWN = 10.0  # seconds for which a replica that failed is passed over while another is there


@dataclass(eq=False, slots=True)
class Replica:
    """One server of the side, what waits for it and how it fares.

    `scoring` tells the kind of its calls in flight, never of both kinds: vLLM spoils the top-K lists of a
    batch in which it scores chosen ids.
    """

    endpoint: Endpoint
    model: str
    waiting: list[Ask] = field(default_factory=list)
    calls: int = 0
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
    """One row wanted: the `k` most likely ids behind a prefix, or the scores of chosen ids when `k` is 0."""

    seat: Seat
    k: int
    ids: tuple[int, ...]
    answer: asyncio.Future[dict[int, float]]


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

    def top(self, seat: Seat, k: int) -> asyncio.Future[dict[int, float]]:
        """The `k` most likely ids behind the seat's prefix."""
        return self._ask(Ask(seat, k, (), self._client.loop.create_future()))

    def score(self, seat: Seat, ids: Sequence[int]) -> list[asyncio.Future[dict[int, float]]]:
        """Log-probabilities of chosen ids, in as many parts as a server takes at once."""
        parts = [tuple(ids[at : at + MAX_SCORED]) for at in range(0, len(ids), MAX_SCORED)]
        return [self._ask(Ask(seat, 0, part, self._client.loop.create_future())) for part in parts]

    def _ask(self, ask: Ask) -> asyncio.Future[dict[int, float]]:
        replica = ask.seat.replica
        replica.waiting.append(ask)
        self._wake(replica)
        return ask.answer

    def _wake(self, replica: Replica) -> None:
        """Sends what waits after every sequence that is ready now has asked: rows gather, a lone one goes at once."""
        if replica.waiting and not replica.flushing and replica.calls < self.max_calls:
            if replica.seats == 1:
                self._flush(replica)
            else:
                replica.flushing = True
                self._client.loop.call_soon(self._flush, replica)

    def _flush(self, replica: Replica) -> None:
        replica.flushing = False
        while replica.waiting and replica.calls < self.max_calls:
            asks = self._next_call(replica)
            if not asks:
                return
            replica.calls += 1
            replica.scoring = asks[0].k == 0
            task = self._client.loop.create_task(self._carry(replica, asks))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next_call(self, replica: Replica) -> list[Ask]:
        """Takes waiting asks that can share a call: the same K, or chosen ids that fit into one list.

        First rows have prompts to read, so they do not hold up the others.
        """
        replica.waiting = [ask for ask in replica.waiting if not ask.answer.done()]
        if replica.waiting and replica.calls and (replica.waiting[0].k == 0) != replica.scoring:
            return []
        taken: list[Ask] = []
        left: list[Ask] = []
        scored: set[int] = set()
        for ask in replica.waiting:
            first = taken[0] if taken else ask
            alike = ask.k == first.k and ask.seat.fresh == first.seat.fresh and len(taken) < self.max_rows
            if alike and len(scored | set(ask.ids)) <= MAX_SCORED:
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
            replica.calls -= 1
            self._wake(replica)

    async def _carry_alone(self, ask: Ask) -> None:
        """One ask of a call that was refused: only the one at fault shall fail."""
        try:
            row = (await self._persist([ask]))[0]
        except CallFailed as failure:
            _refuse(ask, failure)
        else:
            _answer(ask, row)

    async def _persist(self, asks: list[Ask]) -> list[dict[int, float]]:
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
                replica.down_until = monotonic() + COOL_DOWN
                refuge = min(self._living(), key=lambda other: other.seats, default=None)
                if refuge is None:
                    await asyncio.sleep(self._client.wait(max(0, attempt - len(self.replicas) + 1), failure))
                    refuge = self.replicas[(self.replicas.index(replica) + 1) % len(self.replicas)]
                for ask in asks:
                    self._move(ask.seat, refuge)
                attempt += 1
            else:
                replica.down_until = 0.0
                return rows

    async def _call(self, replica: Replica, asks: list[Ask]) -> list[dict[int, float]]:
        prompts = [ask.seat.prefix for ask in asks]
        body: dict[str, Any]
        if asks[0].k:
            body = top_body(replica.model, prompts, asks[0].k)
            return read_top(await self._client.once(replica.endpoint, "/completions", body), len(asks), asks[0].k)
        ids = sorted({i for ask in asks for i in ask.ids})
        body = score_body(replica.model, prompts, ids)
        return read_scores(await self._client.once(replica.endpoint, "/completions", body), len(asks), ids)

    def _living(self) -> list[Replica]:
        now = monotonic()
        return [replica for replica in self.replicas if replica.down_until <= now]

    def _move(self, seat: Seat, replica: Replica) -> None:
        seat.replica.seats -= 1
        replica.seats += 1
        seat.replica = replica


def _answer(ask: Ask, row: dict[int, float]) -> None:
    if not ask.answer.done():
        ask.answer.set_result(row if ask.k else {i: row[i] for i in ask.ids})


def _refuse(ask: Ask, failure: CallFailed) -> None:
    if not ask.answer.done():
        ask.answer.set_exception(failure)
        ask.answer.exception()  # whoever waits learns of it; where nobody does any more, asyncio need not complain

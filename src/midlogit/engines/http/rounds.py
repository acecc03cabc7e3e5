"""The requests of one round of a sequence, and the gate through which rounds pass; knows no server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import NamedTuple

from midlogit.engines.http.replicas import PendingRow
from midlogit.engines.http.rows import DraftRequest, DraftStep


@dataclass(frozen=True, slots=True)
class ListWidth:
    """Numbers of log-probabilities to request from each side.

    Attributes:
        start: for the first row. maximum: the most that the servers allow.
        drafting: from both sides where the base drafts; ids listed beyond `start` need not be scored.
        tolerance: on the certified bound, above which a row is requested again wider; None to stay at `start`.
    """

    start: int
    maximum: int
    drafting: int
    tolerance: float | None

    def at_least(self, listed: int) -> ListWidth:
        """The width where this many candidates are to be reported."""
        return replace(self, start=max(self.start, listed), drafting=max(self.drafting, listed))


class PendingDrafts(NamedTuple):
    """Drafts that the base's server is making."""

    request: DraftRequest
    steps: asyncio.Future[list[DraftStep]]


@dataclass(frozen=True, slots=True, eq=False)
class PendingRound:
    """The requests of a sequence's next round.

    Attributes:
        started: time of the requests. batch: sequences that ran then.
        weight_version: of the base then.
        rows: of base and teacher, in a lock-step round. drafts: in a speculative one.
    """

    started: float
    batch: int
    weight_version: int | str | None
    rows: tuple[PendingRow, ...] = ()
    drafts: PendingDrafts | None = None

    @property
    def num_drafts(self) -> int:
        return 0 if self.drafts is None else self.drafts.request.num_drafts

    def cancel(self) -> None:
        for future in self.rows if self.drafts is None else (self.drafts.steps,):
            future.cancel()


class Gate:
    """Lets rounds begin while it is open; whoever shuts it waits for those that have begun."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._inside: set[PendingRound] = set()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    async def wait(self) -> None:
        """Waits until it is open."""
        await self._open.wait()

    def enter(self, begun: PendingRound) -> PendingRound:
        """Notes a round that has begun."""
        self._inside.add(begun)
        self._empty.clear()
        return begun

    def leave(self, ended: PendingRound) -> None:
        """Notes that a round needs the servers no more; may be called twice."""
        self._inside.discard(ended)
        if not self._inside:
            self._empty.set()

    async def shut(self) -> None:
        """Lets no more rounds begin, and waits until all have ended."""
        self._open.clear()
        await self._empty.wait()

    def open(self) -> None:
        """Lets rounds begin."""
        self._open.set()

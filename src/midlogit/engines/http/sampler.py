"""Sampling for all sequences whose rows have come in one turn of the event loop; knows rows and settings, no server."""

from __future__ import annotations

import asyncio
from collections.abc import Sized
from itertools import pairwise
from typing import NamedTuple, TypeVar

from midlogit.decide.base import RowSettings
from midlogit.decide.truncated.rows import SampledTokens, sample_truncated
from midlogit.engines.http.paired_sides import TopPair
from midlogit.outputs import Decision

T = TypeVar("T")

SENDING_TURNS = (
    6  # turns of the loop within which aiohttp has written the calls that were requested
)


class SampledToken(NamedTuple):
    """A sampled token, None where nothing could be sampled, and its decision, computed later."""

    token_id: int | None
    decision: asyncio.Future[Decision]


class Sampler:
    """Samples for several sequences at once, and computes their decisions while the servers work.

    Args:
        vocabulary: ids below it are drawn.
        running: the sequences that may sample.
        at_once: whether decisions are needed before the next rows can be requested.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, vocabulary: int, running: Sized, *, at_once: bool
    ) -> None:
        self._loop = loop
        self._vocabulary = vocabulary
        self._running = running
        self._at_once = at_once
        self._ready: list[
            tuple[list[TopPair], list[RowSettings], asyncio.Future[list[SampledToken]]]
        ] = []

    async def sample(self, pairs: list[TopPair], settings: list[RowSettings]) -> list[SampledToken]:
        """Samples together with every other sequence that has its rows in this turn of the loop."""
        sampled: asyncio.Future[list[SampledToken]] = self._loop.create_future()
        self._ready.append((pairs, settings, sampled))
        if len(self._running) == 1:  # no other sequence to wait for
            self._sample_ready()
        elif len(self._ready) == 1:
            self._loop.call_soon(self._sample_ready)
        return await sampled

    def _sample_ready(self) -> None:
        ready, self._ready = self._ready, []
        waiting = [sampled for _, _, sampled in ready]
        pairs = [pair for pairs, _, _ in ready for pair in pairs]
        settings = [s for _, settings, _ in ready for s in settings]
        try:
            drawn = sample_truncated(pairs, settings, self._vocabulary)
            tokens = [
                SampledToken(token_id, self._loop.create_future()) for token_id in drawn.token_ids
            ]
        except Exception as error:  # it must reach the sequences that wait
            _fail(waiting, error)
            return

        ends = [0]
        for pairs, _, _ in ready:
            ends.append(ends[-1] + len(pairs))
        _resolve(waiting, [tokens[start:end] for start, end in pairwise(ends)])

        turns = 0 if self._at_once else SENDING_TURNS
        self._describe(turns, drawn, [token.decision for token in tokens])

    def _describe(
        self, turns: int, drawn: SampledTokens, waiting: list[asyncio.Future[Decision]]
    ) -> None:
        """Computes the deferred decisions after `turns` iterations of the event loop."""
        if turns:
            self._loop.call_soon(self._describe, turns - 1, drawn, waiting)
            return
        try:
            decisions = drawn.decisions()
        except Exception as error:
            _fail(waiting, error)
        else:
            _resolve(waiting, decisions)


def _resolve(waiting: list[asyncio.Future[T]], results: list[T]) -> None:
    for future, result in zip(waiting, results, strict=True):
        if not future.done():
            future.set_result(result)


def _fail(waiting: list[asyncio.Future[T]], error: Exception) -> None:
    for future in waiting:
        if not future.done():
            future.set_exception(error)

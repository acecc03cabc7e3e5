"""Threads for work that would hold up the event loop, in which requests take turns; knows no request.

Every request has one piece of work in a lane at a time, and lanes are first in, first out: so of several requests with
many pieces each gets as many turns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TypeVar

T = TypeVar("T")

LONG_BODY = 64 * 2**10  # bytes; tokenizing them takes about 0.1 s per side
TURN_S = 0.01  # seconds after which a request lets others have their turn


class Lanes:
    """The threads of one server: for reading short requests, for checking and reading long ones, and for answers.

    However many long requests come, they have one thread, so together they take one share of the processor and of the
    interpreter.
    """

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, "midlogit-prompts")
        self._long = ThreadPoolExecutor(1, "midlogit-long-prompts")
        self._answers = ThreadPoolExecutor(2, "midlogit-answers")

    async def read(self, work: Callable[[], T], size: int) -> T:
        """Runs one piece of work that tokenizes.

        Args:
            size: bytes of the body. A short request never waits for a long one.
        """
        return await _run(self._short if size <= LONG_BODY else self._long, work)

    async def read_all(self, work: Iterator[T], size: int) -> list[T]:
        """Runs work that tokenizes piece by piece; cancelling it ends it after the current one.

        Args:
            size: as of `read`.
        """
        found: list[T] = []
        over = False
        while not over:
            over = await self.read(partial(_turn, work, found), size)
        return found

    async def check(self, work: Callable[[], T]) -> T:
        """Runs one piece of work on a long body, before it is read."""
        return await _run(self._long, work)

    async def compute(self, work: Callable[[], T]) -> T:
        """Makes a part of an answer."""
        return await _run(self._answers, work)


async def _run(lane: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(lane, copy_context().run, work)


def _turn(work: Iterator[T], found: list[T]) -> bool:
    """Adds pieces of work to those found, for as long as a turn; returns whether they were the last."""
    end = time.monotonic() + TURN_S
    for piece in work:
        found.append(piece)
        if time.monotonic() > end:
            return False
    return True

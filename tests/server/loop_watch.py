"""Watches an event loop for callbacks that hold it up; knows asyncio's handles, no server.

What counts is the processor time of the loop's thread in one callback, which does not grow on a busy machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MOST_S = 0.05  # seconds that one callback may take


@contextmanager
def watched(tell: Callable[[float, str], None]) -> Iterator[None]:
    """Tells of each callback that takes longer than MOST_S, in seconds and by its name, while the block runs."""
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        begun = time.thread_time()
        run(handle)
        if (seconds := time.thread_time() - begun) > MOST_S:
            tell(seconds, repr(handle))

    asyncio.Handle._run = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]

"""The other ranks of a pair with tensor parallelism, as rank 0 sees them: processes that make the same calls as it.

Knows processes and messages, no model. Every rank holds a share of both models and runs the same two engine cores:
logits are the same on all ranks once they are gathered, uniforms are counted, so that all schedule and draw the same.
Rank 0 sends each call with what depends on time or on text, once a step; calls that need no other rank wait for the
next that does.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from midlogit.errors import EngineFailure

if TYPE_CHECKING:
    from midlogit.engines.vllm.process import Opening

# A function of a module, which every rank calls with its lockstep and the same arguments.
OnLockstep = Callable[..., Any]

MODULE = "midlogit.engines.vllm.rank"
END_S = 5.0  # until a rank that was told to end is killed
NOTICE_S = 1.0  # in which the end of a rank is noticed
AGAIN = "Open the pair again."


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Call(NamedTuple):
    """A call that another rank makes; `is_answered` if rank 0 waits for what it returns or raises."""

    call: OnLockstep
    arguments: tuple[Any, ...]
    is_answered: bool = False


class Failed(NamedTuple):
    """What a rank sends before it ends."""

    error: Exception


class OtherRank:
    """The process of another rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._last: Failed | None = None
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        # Not forked, and not spawned by multiprocessing either, which would run the user's main module again.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        arguments = map(str, (theirs.fileno(), rank, os.getpid()))
        self.process = subprocess.Popen(
            [sys.executable, "-m", MODULE, *arguments],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # the output of this process is the user's
        )
        theirs.close()

    def receive(self) -> Any:
        """The next message.

        Raises:
            EngineFailure: the rank has failed.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise self.failure() from None
        if isinstance(message, Failed):
            self._last = message
            raise self.failure()
        return message

    def failure(self) -> EngineFailure:
        """Why the rank has ended, or is about to."""
        with suppress(EOFError, OSError):
            while self._last is None and self.connection.poll():
                message = self.connection.recv()
                self._last = message if isinstance(message, Failed) else None
        if self._last is not None:
            return EngineFailure(f"Rank {self.rank} of the pair failed: {self._last.error}", AGAIN)

        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        code = self.process.returncode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return EngineFailure(f"Rank {self.rank} of the pair has ended {how}.", AGAIN)


class Ranks:
    """All ranks of a pair but this one; none without tensor parallelism.

    Args:
        size: number of ranks, this one included.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._calls: list[Call] = []
        self._is_closed = False
        self._failed: Future[EngineFailure] = Future()  # of the rank that ended first
        self.others: list[OtherRank] = []
        for rank in range(1, size):
            self.others.append(OtherRank(rank))

    def memory(self) -> list[tuple[int, int]]:
        """Free and total bytes of each other rank's device.

        Raises:
            EngineFailure: a rank has failed.
        """
        return [other.receive() for other in self.others]

    def open(self, opening: Opening) -> Any:
        """Opens the models on every rank.

        Returns:
            What `opening.open` gives on this one.

        Raises:
            MidlogitError: one of the ranks cannot.
        """
        if not self.others:
            return opening.open(0)
        self._send_each(opening)
        here: Future[Any] = Future()

        def open_here() -> None:
            try:
                here.set_result(opening.open(0))
            except BaseException as error:  # the caller's
                here.set_exception(error)

        # A rank that fails leaves this one waiting for it inside vLLM; so another thread waits there.
        threading.Thread(target=open_here, name="midlogit-open", daemon=True).start()
        pending = list(self.others)
        while pending or not here.done():
            wait([here], timeout=0.05)
            if here.done() and here.exception() is not None:
                break
            for other in [one for one in pending if one.connection.poll()]:
                other.receive()
                pending.remove(other)
        return here.result()

    def watch(self, ended: Callable[[EngineFailure], None]) -> None:
        """Calls `ended`, in a thread of its own, when a rank ends that was not told to."""

        def watch_one(other: OtherRank) -> None:
            other.process.wait()
            if not self._is_closed:
                failure = other.failure()
                with suppress(InvalidStateError):  # another one has ended before
                    self._failed.set_result(failure)
                self.kill()
                ended(failure)

        for other in self.others:
            name = f"midlogit-rank-{other.rank}"
            threading.Thread(target=watch_one, args=[other], name=name, daemon=True).start()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Runs work that waits for the other ranks inside vLLM.

        That may hear of the end of a rank before `watch`, and can only say that a connection broke.

        Raises:
            EngineFailure: a rank has ended, in place of the error that followed from it.
        """
        try:
            yield
        except EngineFailure:
            raise
        except Exception as error:
            done, _ = wait([self._failed], NOTICE_S if self.others else 0)
            if not done:
                raise
            raise self._failed.result() from error

    def tell(self, call: OnLockstep, *arguments: Any) -> None:
        """Has the other ranks make a call before the next that is sent."""
        if self.others:
            self._calls.append(Call(call, arguments))

    def send(self, call: OnLockstep, *arguments: Any, is_answered: bool = False) -> None:
        """Has the other ranks make a call now.

        Raises:
            EngineFailure: a rank has ended.
        """
        if self.others:
            calls, self._calls = [*self._calls, Call(call, arguments, is_answered)], []
            self._send_each(calls)

    def answers(self) -> list[Any]:
        """What the other ranks returned from the last call, or raised.

        Raises:
            EngineFailure: a rank has ended.
        """
        return [other.receive() for other in self.others]

    def close(self) -> None:
        """Ends the other ranks; may be called twice."""
        self._is_closed = True
        for other in self.others:
            other.connection.close()
        for other in self.others:
            with suppress(subprocess.TimeoutExpired):
                other.process.wait(END_S)
        self.kill()

    def kill(self) -> None:
        """Ends the other ranks at once: they may be waiting for one another."""
        self._is_closed = True
        for other in self.others:
            other.process.kill()
            other.process.wait()

    def _send_each(self, message: Any) -> None:
        content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        for other in self.others:
            try:
                other.connection.send_bytes(content)
            except OSError:
                raise other.failure() from None

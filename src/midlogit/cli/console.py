"""The standard streams of a command and the signals that end it; knows no command.

Whatever the encoding, the disk or the reader of the output, a failure is one line and an exit code.
"""

from __future__ import annotations

import io
import os
import select
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from midlogit.errors import MidlogitError
from midlogit.lines import take_back

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SIGNALS = [
    number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))
]
PATIENCE_S = 1.0  # wait for a stalled reader after a second signal
TICK_S = 0.1


class OutputLost(MidlogitError):
    """Standard output cannot be written any more: a full disk, or a reader that has gone."""


class Signals:
    """Handles Ctrl-C, SIGTERM and SIGHUP while the block runs: each ends it, except inside `noted`.

    A signal that is ignored outside (`nohup`) stays ignored.

    Attributes:
        count: signals so far. code: the exit code of the first, 0 before.
    """

    def __init__(self) -> None:
        self.count = 0
        self.code = 0
        self._is_noted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Only counts signals inside the block, which checks `count` and so is not cut in the middle of its work."""
        self._is_noted = True
        try:
            yield
        finally:
            self._is_noted = False

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        self.code = self.code or 128 + number
        Output.is_hurried = self.count > 1
        if not self._is_noted:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(self.code)


class Output(io.FileIO):
    """Unbuffered standard output: each write is complete, or raises OutputLost with the reason.

    Attributes:
        is_hurried: whether to give up on a stalled reader after PATIENCE_S.
    """

    is_hurried = False

    def __init__(self) -> None:
        super().__init__(1, "wb", closefd=False)
        self._is_file = stat.S_ISREG(os.fstat(1).st_mode)
        self._is_lost = False

    def write(self, data: ReadableBuffer) -> int:
        """Writes all data; once the output is lost, none, so that the flush at exit raises no second error."""
        rest = memoryview(data).cast("B")
        size, idle = len(rest), 0.0

        while rest and not self._is_lost:
            try:
                if self._is_file or sys.platform == "win32":
                    rest = rest[os.write(1, rest) :]
                elif select.select((), (1,), (), TICK_S)[1]:
                    idle = 0.0
                    with suppress(BlockingIOError):
                        rest = rest[os.write(1, rest[: select.PIPE_BUF]) :]
                elif self.is_hurried and (idle := idle + TICK_S) > PATIENCE_S:
                    self._lose("Nobody reads standard output", "")
            except BrokenPipeError:
                self._lose("Whoever read standard output has gone; the rest is not written", "")
            except OSError as error:
                take_back(1, (size - len(rest)) * self._is_file)
                self._lose(
                    f"Cannot write to standard output: {error.strerror}", "The rest is not written."
                )
        return size

    def _lose(self, message: str, hint: str) -> None:
        self._is_lost = True
        raise OutputLost(f"{message}.", hint) from None


def set_up_streams() -> None:
    """Makes standard streams that accept any text and report every failure.

    Raises:
        OutputLost: standard output is closed.
    """
    if sys.stdin is None:
        sys.stdin = _nowhere()  # takes the descriptor, so that no other file gets it
    if sys.stdout is None:
        _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()
    if sys.stdout is None:
        raise OutputLost("Standard output is closed.", "Give it a file or a reader.")
    encoding, lines = sys.stdout.encoding, sys.stdout.isatty()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(Output()), encoding, errors="replace", line_buffering=lines
    )


def write_text(text: str) -> None:
    """Writes text in the encoding of standard output and flushes it."""
    print(text, end="", flush=True)


def write_json_line(line: bytes) -> None:
    """Writes a line of JSON, in UTF-8 whatever the encoding (RFC 8259), and flushes it."""
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def complain(message: object) -> None:
    """Writes one line to standard error; nothing if that is lost as well."""
    try:
        print(f"midlogit: {' '.join(str(message).splitlines())}", file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = _nowhere()


def _nowhere() -> TextIO:
    return io.TextIOWrapper(io.FileIO(os.devnull, "r+"), "utf-8")

"""Prompts from arguments, text and JSON lines, each with the place it came from; knows no model.

Inputs are read as their rows are asked for, so that they may be of any length. Whether a model takes a prompt is
checked elsewhere.
"""

from __future__ import annotations

import os
import queue
import stat
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from midlogit.errors import InvalidRequest
from midlogit.jobs.inputs.fields import read_prompts
from midlogit.jobs.inputs.lines import check_encoding, open_stream, read_lines
from midlogit.jobs.inputs.reading import is_text, json_row
from midlogit.jobs.inputs.row import Columns, Row

FIRST_ROWS = 1000  # of a file, which are read before a model is loaded
READ_AHEAD = 64  # rows that may wait after a pipe


def rows_of_arguments(prompts: list[str]) -> list[Row]:
    """The prompts of the command line; bytes that are not text in its encoding make the row an error."""
    rows = []
    for number, prompt in enumerate(prompts, 1):
        where = f"prompt {number}"
        try:
            prompt.encode()
        except UnicodeEncodeError:
            error = "It holds bytes that are not UTF-8. Put it into a file: --input FILE."
            rows.append(Row(where, error=error))
        else:
            rows.append(Row(where, prompt=prompt))
    return rows


class Source(ABC):
    """The rows of a call, in order.

    Attributes:
        num_first: how many are to be read before a model is loaded.
        blocks: whether reading one may take any time. is_held: whether all are in memory.
        can_repeat: whether they can be iterated over more than once.
    """

    num_first: int
    blocks: bool
    is_held: bool
    can_repeat: bool

    @abstractmethod
    def __iter__(self) -> Iterator[Row]: ...

    @abstractmethod
    def count(self) -> int | None:
        """The number of rows; None where it is not known."""


class Held(Source):
    """Rows in memory."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows
        self.num_first = len(rows)
        self.blocks, self.is_held, self.can_repeat = False, True, True

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def count(self) -> int:
        return len(self._rows)


class Input(Source):
    """The rows of a file, or of standard input where there is none, read as they are asked for.

    An input is read as JSON lines if the file's name ends in .jsonl or .ndjson, or if columns are named. Bytes of
    another encoding are raised in the first rows, and make an error of their row further on.

    Raises:
        InvalidRequest: no such file, an unknown encoding, or nobody types prompts; while iterating, bytes of another
            encoding in the first rows, no prompt at all, or a file that cannot be read to its end.
    """

    def __init__(self, file: Path | None, encoding: str, columns: Columns) -> None:
        if file is None and sys.stdin.isatty():
            raise InvalidRequest(
                "There is no prompt.", "Give one, or pipe prompts in, one per line."
            )
        check_encoding(encoding)
        self._file, self._encoding, self._columns = file, encoding, columns
        self._name = "standard input" if file is None else str(file)

        try:
            found = os.fstat(sys.stdin.fileno()) if file is None else file.stat()
        except OSError as error:
            raise InvalidRequest(f"Cannot read {self._name}: {error.strerror}.") from None
        if not stat.S_ISFIFO(found.st_mode):  # one that is opened twice loses what writes into it
            self._open().close()

        is_regular = stat.S_ISREG(found.st_mode)
        self.num_first = FIRST_ROWS if is_regular else 1
        self.blocks, self.is_held, self.can_repeat = (
            not is_regular,
            False,
            is_regular and file is not None,
        )

    def __iter__(self) -> Iterator[Row]:
        is_json = bool(self._columns.named) or (self._file is not None and not is_text(self._file))
        position = -1
        with (
            self._open() as stream,
            closing(read_lines(stream, self._name, self._encoding)) as lines,
        ):
            for position, (number, text, error) in enumerate(lines):
                where = f"{self._name}, line {number}"
                if error is not None and position < self.num_first:
                    raise InvalidRequest(f"{where}: {error}")
                if error is not None:
                    yield Row(where, error=error)
                elif is_json:
                    yield json_row(where, text, partial(_row, self._columns))
                else:
                    yield Row(where, prompt=text)

        if position < 0:
            name = self._name[0].upper() + self._name[1:]
            raise InvalidRequest(f"{name} holds no prompt.", "Give one per line.")

    def count(self) -> int | None:
        if not self.can_repeat:
            return None
        with self._open() as stream:
            return sum(1 for _ in read_lines(stream, self._name, self._encoding))

    def _open(self) -> BinaryIO:
        """The stream; of standard input a buffer of its own, so that a thread that reads holds up no exit."""
        if self._file is None:
            return open(sys.stdin.fileno(), "rb", closefd=False)
        return open_stream(self._file)


def as_they_come(rows: Iterator[Row]) -> Iterator[Row | None]:
    """Rows that a thread reads from a pipe; None where the next has not come yet."""
    found: queue.Queue[Row | Exception | None] = queue.Queue(READ_AHEAD)

    def read() -> None:
        try:
            for row in rows:
                found.put(row)
            found.put(None)
        except Exception as error:  # raised below, by whoever takes the rows
            found.put(error)

    threading.Thread(target=read, name="midlogit-input", daemon=True).start()
    while True:
        try:
            row = found.get_nowait()
        except queue.Empty:
            yield None
            continue
        if row is None:
            return
        if isinstance(row, Exception):
            raise row
        yield row


def _row(columns: Columns, where: str, values: Mapping[str, Any]) -> Row:
    """The row of a JSON object: its prompts alone."""
    try:
        prompt, base_prompt = read_prompts(values, columns)
    except InvalidRequest as error:
        return Row(where, error=str(error))
    return Row(where, prompt=prompt, base_prompt=base_prompt)

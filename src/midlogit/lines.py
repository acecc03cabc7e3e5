"""Whole lines at the end of files that are appended to: logs, journals, standard output; knows no contents."""

from __future__ import annotations

import os
from contextlib import suppress


def append(descriptor: int, line: bytes) -> None:
    """Writes all of a line to a regular file, or where the disk is full nothing of it.

    Raises:
        OSError: why it cannot be written.
    """
    written = 0
    try:
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        take_back(descriptor, written)
        raise


def take_back(descriptor: int, written: int) -> None:
    """Removes the last bytes written to a regular file, unless something has been written after them."""
    with suppress(OSError):  # a pipe or terminal has no end to look at
        end = os.lseek(descriptor, 0, os.SEEK_CUR)
        if written and os.fstat(descriptor).st_size == end:
            os.ftruncate(descriptor, end - written)
            os.lseek(descriptor, end - written, os.SEEK_SET)

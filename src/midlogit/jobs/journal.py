"""Journals: finished completions of a part that is not whole yet, one file per attempt; knows records, not parts.

A record is one line, written by one call. No attempt appends to the file of another, so a line that a crash tore can
only be the last of its file, and is skipped.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from midlogit import lines
from midlogit.jobs.files import unique_name
from midlogit.jobs.part_files import part_name
from midlogit.jobs.schema import FLAG_LISTS, Record

SYNC_S = 5.0  # between syncs to the device: what a power failure can cost


class Journal:
    """The journal of one attempt at one part.

    Args:
        folder: of all journals. number: the part's.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"{part_name(number)}.{unique_name()}.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._synced = time.monotonic()

    def append(self, row: int, record: Record) -> None:
        """Writes the record of a completion of a row of the part."""
        line = orjson.dumps({"row": row, **_encoded(record)}) + b"\n"
        lines.append(self._file, line)
        if time.monotonic() - self._synced > SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Has the system write what was appended to the device."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def journals_of(folder: Path, number: int) -> list[Path]:
    """The journals of all attempts at a part."""
    return sorted(folder.glob(f"{part_name(number)}.*.jsonl"))


def read_journals(folder: Path, number: int) -> Iterator[tuple[int, Record]]:
    """(row of the part, record) of every whole line in the journals of a part; one item may come several times."""
    for path in journals_of(folder, number):
        yield from read_journal(path)


def read_journal(path: Path) -> Iterator[tuple[int, Record]]:
    """(row of the part, record) of every whole line of a journal; nothing of one that is gone, its part being done."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                data = orjson.loads(line)
                row = data.pop("row")
            except (orjson.JSONDecodeError, KeyError, AttributeError):
                continue
            if line.endswith(b"\n"):
                yield row, _decoded(data)


def _encoded(record: Record) -> dict[str, Any]:
    """A record for JSON: arrays as their bytes in base64, which keeps every bit and every infinity."""
    return {
        name: {"b64": base64.b64encode(value.tobytes()).decode()}
        if isinstance(value, np.ndarray)
        else value
        for name, value in record.items()
    }


def _decoded(data: dict[str, Any]) -> Record:
    return {
        name: np.frombuffer(base64.b64decode(value["b64"]), _dtype(name))
        if isinstance(value, dict)
        else value
        for name, value in data.items()
    }


def _dtype(name: str) -> type[np.generic]:
    if name in FLAG_LISTS:
        return np.bool_
    return np.int32 if name.endswith(("_ids", "_counts")) else np.float32

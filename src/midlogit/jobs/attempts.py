"""How often an engine died while a part was open: after ISOLATE_AFTER deaths its items run one at a time.

Only failures that the process saw count: one that was killed may have been pre-empted, and says nothing of its rows.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime

import orjson

from midlogit import lines
from midlogit.jobs.part_files import part_name
from midlogit.jobs.run_folder import RunFolder

ISOLATE_AFTER = 3


class Attempts:
    """The failures of engines, one file per part with one line each."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder.attempts

    def record(self, part: int, error: str) -> None:
        """Takes note that an engine died while a part was open."""
        line = orjson.dumps(
            {"time": datetime.now(UTC).isoformat(timespec="seconds"), "error": error}
        )
        file = os.open(
            self._folder / part_name(part), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666
        )
        try:
            lines.append(file, line + b"\n")
            os.fsync(file)
        finally:
            os.close(file)

    def count(self, part: int) -> int:
        """How often an engine died while the part was open."""
        try:
            return (self._folder / part_name(part)).read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def is_isolated(self, part: int) -> bool:
        """Whether the part's items must run one at a time."""
        return self.count(part) >= ISOLATE_AFTER

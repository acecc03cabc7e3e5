"""Who works on which part: claims that save double work, heartbeats that say who lives; correctness needs neither.

Two workers on one part cannot harm its results: whoever links the file first has made it. A worker counts as dead when
its process is gone from this machine, or when it has not been heard of for STALE_S.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from midlogit.jobs.errors import Occupied
from midlogit.jobs.files import HOST, is_process, unique_name
from midlogit.jobs.part_files import part_name
from midlogit.jobs.run_folder import RunFolder

BEAT_S = 10.0
STALE_S = 60.0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a worker says of itself.

    Attributes:
        items, tokens: finished by it. tokens_per_s: over the last minutes. errors: of the items.
    """

    host: str
    pid: int
    worker: str
    items: int
    tokens: int
    tokens_per_s: float
    errors: int


class Presence:
    """A worker's presence in a job: its heartbeat and its claims.

    Args:
        role: such as "0/1"; one process of a machine has a role at a time.

    Raises:
        Occupied: another process of this machine has the role.
    """

    def __init__(self, folder: RunFolder, role: str) -> None:
        self.name = unique_name()
        self.role = role
        self._folder = folder
        self._file = folder.workers / f"{self.name}.json"
        self._lock = _lock(folder.workers / f"{HOST}.{role.replace('/', '-of-')}.lock", role)
        self._next_beat = 0.0
        self.beat()

    def beat(
        self, items: int = 0, tokens: int = 0, tokens_per_s: float = 0.0, errors: int = 0
    ) -> None:
        """Says that the worker lives, at most every BEAT_S."""
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + BEAT_S
        beat = Heartbeat(HOST, os.getpid(), self.role, items, tokens, tokens_per_s, errors)
        written = self._file.with_suffix(".new")
        written.write_bytes(orjson.dumps(asdict(beat)))
        written.replace(self._file)

    def claim(self, part: int) -> bool:
        """Takes a part, unless a worker that lives has it."""
        path = self._folder.claims / part_name(part)
        for _ in range(2):
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                if self._holder_lives(path):
                    return False
                path.unlink(missing_ok=True)
                continue
            os.write(descriptor, self.name.encode())
            os.close(descriptor)
            return True
        return False

    def release(self, part: int) -> None:
        """Gives a part back."""
        (self._folder.claims / part_name(part)).unlink(missing_ok=True)

    def close(self) -> None:
        """Ends the presence."""
        self._file.unlink(missing_ok=True)
        os.close(self._lock)

    def _holder_lives(self, claim: Path) -> bool:
        try:
            holder = claim.read_text()
            age = self._file.stat().st_mtime - claim.stat().st_mtime
        except OSError:
            return False
        if not holder:  # being written
            return age < STALE_S
        return lives(self._folder.workers / f"{holder}.json", now=self._file.stat().st_mtime)


def lives(heartbeat: Path, now: float) -> bool:
    """Whether the worker of a heartbeat is alive, at a time on the clock of the file system."""
    try:
        beat = orjson.loads(heartbeat.read_bytes())
        age = now - heartbeat.stat().st_mtime
    except (OSError, orjson.JSONDecodeError):
        return False
    return age < STALE_S and not (beat["host"] == HOST and not is_process(beat["pid"]))


def heartbeats(folder: RunFolder) -> list[dict[str, Any]]:
    """The heartbeats of all workers that are alive."""
    now = time.time()
    found = []
    for path in sorted(folder.workers.glob("*.json")):
        if lives(path, now):
            with suppress(OSError, orjson.JSONDecodeError):
                found.append(orjson.loads(path.read_bytes()))
    return found


def _lock(path: Path, role: str) -> int:
    """Locks a role on this machine; the system gives it back when the process ends, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Occupied(
            f"Another process of this machine works on this job as worker {role}.",
            "Wait for it, or give each process a role: --worker 0/2, --worker 1/2.",
        ) from None
    except OSError:  # a file system without locks
        pass
    return descriptor

"""Files that survive a crash: written whole under another name, synced, then linked or renamed; knows no contents."""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HOST = socket.gethostname()
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def unique_name() -> str:
    """A name that no other process on any machine uses: host, process and a random part."""
    return f"{HOST}-{os.getpid()}-{secrets.token_hex(4)}"


def is_abandoned(name: str) -> bool:
    """Whether a name was made by `unique_name` in a process of this machine that is gone."""
    made = re.fullmatch(r"(?:.*\.)?" + re.escape(HOST) + r"-(\d+)-[0-9a-f]{8}(?:\.json)?", name)
    return made is not None and not is_process(int(made[1]))


def is_process(pid: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def new_file(final: Path, scratch: Path, *, replace: bool = False) -> Iterator[Path]:
    """A path to write a file to, which becomes `final` at the end of the block; a crash leaves `final` as it was.

    Args:
        scratch: a folder on the same file system as `final`.
        replace: whether a file that is there already is replaced; otherwise it stays, and the new one is dropped.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    written = scratch / f"{final.name}.{unique_name()}"
    try:
        yield written
        sync(written)
        if replace:
            written.replace(final)
        else:
            _link(written, final)
        sync(final.parent)
    finally:
        with suppress(FileNotFoundError):
            written.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all: until then one of that name stays as it was.

    What is no file, such as a pipe or terminal, is written to as it is.

    Raises:
        OSError: it cannot be written; names it.
    """
    target = path.resolve()
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(content)
            return
        target.parent.stat()  # no folder is made
        with new_file(target, target.parent, replace=True) as written:
            written.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Has the system write a file, or the names in a folder, to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(written: Path, final: Path) -> None:
    """Gives a written file its final name, unless there is such a file."""
    try:
        final.hardlink_to(written)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if not final.exists():  # a file system without hard links
            written.rename(final)

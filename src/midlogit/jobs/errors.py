"""The errors of batch jobs, besides those of the pair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from midlogit.errors import InvalidRequest, MidlogitError


class TooManyErrors(MidlogitError):
    """More completions that ended as errors than the job allows; what was finished is kept."""


class StorageFailure(MidlogitError, OSError):
    """A job's folder that cannot be written: a full or read-only disk; what was finished before is kept."""

    retryable = True


class Occupied(MidlogitError):
    """A job that another process on this machine works on in the same role."""

    retryable = True


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns the errors of a disk into one that says what to do.

    Raises:
        StorageFailure: `path` cannot be written.
    """
    try:
        yield
    except InvalidRequest:
        raise
    except OSError as error:
        if isinstance(error, StorageFailure) or not error.strerror:
            raise
        raise StorageFailure(
            f"Cannot write {path}: {error.strerror}.", "Make room, or name another folder."
        ) from error

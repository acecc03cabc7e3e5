"""The errors of batch jobs, besides those of the pair."""

from __future__ import annotations

from midlogit.errors import MidlogitError


class TooManyErrors(MidlogitError):
    """More completions that ended as errors than the job allows; what was finished is kept."""


class StorageFailure(MidlogitError, OSError):
    """A job's folder that cannot be written: a full or read-only disk; what was finished before is kept."""

    retryable = True


class Occupied(MidlogitError):
    """A job that another process on this machine works on in the same role."""

    retryable = True

"""Whether a value that a caller gave is of its kind, and numbers that count; knows no parameter."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from midlogit.errors import InvalidRequest

KINDS: dict[str, tuple[type, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "bool": (bool, "True or False"),
}


def require_kind(kind: str, **values: object) -> None:
    """Checks values by the names that the caller knows them by.

    Args:
        kind: a type as annotations write it, of `KINDS`; True and False are no numbers.

    Raises:
        InvalidRequest: a value is of another kind; says which.
    """
    wanted, words = KINDS[kind]
    for name, value in values.items():
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise InvalidRequest(f"{name} is {value!r:.80}.", f"It must be {words}.")


def require_count(**values: Any) -> None:
    """Checks whole numbers of at least 1 by the names that the caller knows them by.

    Raises:
        InvalidRequest: a value is none; says which.
    """
    require_kind("int", **values)
    for name, value in values.items():
        if value < 1:
            raise InvalidRequest(f"{name} is {value}.", "It must be at least 1.")

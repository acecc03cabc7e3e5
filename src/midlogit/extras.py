"""Turns a missing optional dependency into the pip line that installs it; knows the names of the extras."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from midlogit.errors import MissingExtra

TRANSFORMERS = (5, 17)  # the oldest that midlogit[local] takes


def has_transformers() -> bool:
    """Whether transformers is here in a version that midlogit takes; reads its metadata, imports nothing.

    Trainers pin older ones, and beside them pairs over HTTP take everything from the servers.
    """
    try:
        major, minor, *_ = version("transformers").split(".")
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= TRANSFORMERS


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`, which `extra` installs.

    Raises:
        MissingExtra: with the pip line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{error.name} is not installed.", f"Run: pip install 'midlogit[{extra}]'"
        ) from error

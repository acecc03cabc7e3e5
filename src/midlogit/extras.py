"""Turns a missing optional dependency into the pip line that installs it; knows the names of the extras."""

from __future__ import annotations

import importlib
from types import ModuleType

from midlogit.errors import MissingExtra


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

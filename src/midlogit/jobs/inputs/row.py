"""A row of an input and the names of its columns; knows no file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from midlogit.requests.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns of an input.

    Attributes:
        prompt: None for `prompt`, else `messages`, whichever a row has.
        base_prompt: None where the base has no prompt of its own.
        id: None for `id`, else `custom_id`, where the input has one.
    """

    prompt: str | None = None
    base_prompt: str | None = None
    id: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The names that were given."""
        names = (self.id, self.prompt, self.base_prompt)
        return tuple(name for name in names if name is not None)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an input, or the reason why it cannot be used.

    Attributes:
        where: its file with its line or row, counted from 1; for messages.
        row_id: its value in the id column; None where the input has no such column.
        prompt: the teacher's: text, chat messages or token ids; None where it cannot be read.
        base_prompt: the base's own prompt; None for the same.
        overrides: parameters of this row by name, as given, for `with_overrides`; none for a row with an error.
        carried: the user's other columns by name.
        error: why it cannot be used, in full sentences; None where it can.
    """

    where: str
    row_id: str | None = None
    prompt: Prompt | None = None
    base_prompt: Prompt | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    carried: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

"""Makes a Row of the values of its columns; knows their names and types, no file format.

Values that cannot be used make the row an error; nothing is raised for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from midlogit.errors import InvalidRequest
from midlogit.extras import require
from midlogit.jobs.inputs.overrides import PARAMETERS, check_overrides
from midlogit.jobs.inputs.row import Columns, Row
from midlogit.requests.prompts import Prompt

if TYPE_CHECKING:
    from midlogit.jobs.inputs.openai import BatchRequest

PROMPTS = ("prompt", "messages")
IDS = ("id", "custom_id")
OF_BATCHES = ("method", "url", "body")  # columns of an OpenAI batch file


class Fields:
    """Makes the rows of one file.

    Whether the file has ids is seen from its first row: a later one that differs is an error.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._id = columns.id
        self._first: tuple[str, ...] | None = None
        self._not_found = set(columns.named)

    def begin(self, names: Iterable[str]) -> None:
        """Takes the columns of the first row."""
        self._first = tuple(names)
        if self._id is None:
            self._id = next((name for name in IDS if name in self._first), None)
        self._not_found.difference_update(self._first)

    def require_columns(self, file: str) -> None:
        """Refuses the file if a column that was named is in none of its rows so far.

        Raises:
            InvalidRequest: names the columns that there are.
        """
        for name in self._columns.named:
            if self._first is not None and name in self._not_found:
                shown = ", ".join(map(repr, self._first)) or "none"
                raise InvalidRequest(f"{file} has no column {name!r}.", f"Its columns are {shown}.")

    def row(self, where: str, values: Mapping[str, Any]) -> Row:
        """The row of these values, by column."""
        if self._first is None:
            self.begin(values)
        if self._not_found:
            self._not_found.difference_update(values)

        rest = dict(values)
        given_id = None if self._id is None else rest.pop(self._id, None)
        batch = self._is_of_a_batch(values) and [rest.pop(name, None) for name in OF_BATCHES]
        if not batch:
            self._drop_prompts(rest)
        overrides = {
            name: value
            for name in PARAMETERS
            if name in rest and (value := rest.pop(name)) is not None
        }

        row_id = prompt = base_prompt = None
        try:
            row_id = self._row_id(given_id, rest)
            if batch:
                prompt, base_prompt, asked = _read_request(*batch)
                overrides |= asked
            else:
                prompt, base_prompt = read_prompts(values, self._columns)
            check_overrides(overrides)
        except InvalidRequest as error:
            return Row(where, row_id, prompt, base_prompt, {}, rest, str(error))
        return Row(where, row_id, prompt, base_prompt, overrides, rest)

    def _is_of_a_batch(self, values: Mapping[str, Any]) -> bool:
        return (
            self._columns.prompt is None
            and values.keys() >= set(OF_BATCHES)
            and not any(name in values for name in PROMPTS)
        )

    def _drop_prompts(self, rest: dict[str, Any]) -> None:
        """Drops the columns of prompts: of the default ones those up to the first that has a value."""
        for name in _prompt_names(self._columns):
            if rest.pop(name, None) is not None:
                break
        if self._columns.base_prompt is not None:
            rest.pop(self._columns.base_prompt, None)

    def _row_id(self, given: Any, rest: Mapping[str, Any]) -> str | None:
        """The id as text; None where the file has none.

        Raises:
            InvalidRequest: no text and no whole number, or only some rows have one.
        """
        if self._id is None:
            own = next((name for name in IDS if name in rest), None)
            if own is not None:
                raise InvalidRequest(
                    f"It has {own!r}, which rows before it lack.", "Give every row an id, or none."
                )
            return None
        if given is None:
            raise InvalidRequest(f"It has no {self._id!r}.", "Give every row an id, or none.")
        if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
            raise InvalidRequest(
                f"Its {self._id!r} is {given!r:.80}.", "Give text or a whole number."
            )
        return str(given)


def read_prompts(values: Mapping[str, Any], columns: Columns) -> tuple[Prompt, Prompt | None]:
    """The teacher's prompt, and the base's own if it has one.

    Raises:
        InvalidRequest: a column has no value, or one that is no prompt.
    """
    base = columns.base_prompt
    own = None if base is None else _prompt(values, (base,))
    return _prompt(values, _prompt_names(columns)), own


def _prompt_names(columns: Columns) -> tuple[str, ...]:
    return PROMPTS if columns.prompt is None else (columns.prompt,)


def _prompt(values: Mapping[str, Any], names: tuple[str, ...]) -> Prompt:
    """The first of the columns that has a value."""
    found = next((name for name in names if values.get(name) is not None), None)
    if found is None:
        shown = " or ".join(map(repr, names))
        raise InvalidRequest(
            f"It has no {shown}.", f"Its columns are {', '.join(map(repr, values)) or 'none'}."
        )

    value: Any = values[found]
    if isinstance(value, list) and not value:
        raise InvalidRequest(f"Its {found!r} is empty.", "Give text, messages or token ids.")
    if not isinstance(value, str | list) or (
        isinstance(value, list) and set(map(type, value)) not in ({dict}, {int})
    ):
        raise InvalidRequest(f"Its {found!r} is neither text nor messages nor token ids.")
    return value


def _read_request(method: Any, url: Any, body: Any) -> BatchRequest:
    require("pydantic", "server")
    from midlogit.jobs.inputs.openai import read_request

    return read_request(method, url, body)

"""Prompts from arguments, text files and JSON lines, each with the place it came from; knows no model.

Lines are counted as an editor does, blank ones included. Whether a model takes a prompt is checked elsewhere.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from midlogit.errors import InvalidRequest
from midlogit.requests.prompts import Prompt

JSON_LINES = (".jsonl", ".ndjson")
LINE_END = re.compile(r"\r\n|\r|\n")
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, or the reason why it cannot be read.

    Attributes:
        where: its file and line, or its number among the arguments; for messages.
        prompt: text, chat messages or token ids; None where it cannot be read.
        base_prompt: the base's own prompt; None for the same.
        error: why it cannot be read; None where it can.
    """

    where: str
    prompt: Prompt | None
    base_prompt: Prompt | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns of JSON lines.

    Attributes:
        prompt: None for `prompt`, else `messages`. base_prompt: None where the base has no prompt of its own.
    """

    prompt: str | None = None
    base_prompt: str | None = None

    @property
    def are_named(self) -> bool:
        return self.prompt is not None or self.base_prompt is not None


def rows_of_arguments(prompts: list[str]) -> list[Row]:
    """The prompts of the command line; bytes that are not text in its encoding make the row an error."""
    rows = []
    for number, prompt in enumerate(prompts, 1):
        where = f"prompt {number}"
        try:
            prompt.encode()
        except UnicodeEncodeError:
            rows.append(
                Row(
                    where,
                    None,
                    error="It holds bytes that are not UTF-8. Put it into a file: --input FILE.",
                )
            )
        else:
            rows.append(Row(where, prompt))
    return rows


def read_rows(file: Path | None, encoding: str, columns: Columns) -> list[Row]:
    """The rows of a file, or of standard input when there is none.

    An input is read as JSON lines if the file's name ends in .jsonl or .ndjson, or if columns are named.

    Raises:
        InvalidRequest: no such file, an unknown encoding, bytes of another one, or no prompt.
    """
    name = "standard input" if file is None else str(file)
    if file is None and sys.stdin.isatty():
        raise InvalidRequest("There is no prompt.", "Give one, or pipe prompts in, one per line.")

    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"Cannot read {name}: {error.strerror}.") from error

    lines = LINE_END.split(_decode(data, encoding, name))
    is_json = columns.are_named or (file is not None and file.suffix.lower() in JSON_LINES)
    numbered = [
        (f"{name}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not numbered:
        raise InvalidRequest(f"{name[0].upper()}{name[1:]} holds no prompt.", "Give one per line.")
    return [
        _json_row(where, line, columns) if is_json else Row(where, line) for where, line in numbered
    ]


def _decode(data: bytes, encoding: str, name: str) -> str:
    """The text without a byte order mark."""
    hint = f"Save it as {encoding.upper()}, or name what it is, such as --encoding latin-1."
    if encoding.lower() in ("utf-8", "utf8") and data.startswith(WIDE_MARKS):
        raise InvalidRequest(
            f"{name}, line 1: this is UTF-16, not UTF-8.", "Use --encoding utf-16."
        )
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = len(LINE_END.split(data[: error.start].decode(encoding, "replace")))
        byte = f"the byte 0x{data[error.start]:02x} is not {encoding.upper()}"
        raise InvalidRequest(f"{name}, line {line}: {byte}.", hint) from None
    except (LookupError, ValueError) as error:
        raise InvalidRequest(
            f"--encoding is {encoding!r}: {error}.", "Use a text encoding, such as latin-1."
        ) from None


def _json_row(where: str, line: str, columns: Columns) -> Row:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Row(where, None, error=f"It is not JSON: {error.msg}, column {error.colno}.")
    if not isinstance(row, dict):
        return Row(where, None, error='It is no JSON object. Write {"prompt": …}.')

    names = ("prompt", "messages") if columns.prompt is None else (columns.prompt,)
    try:
        base_prompt = None if columns.base_prompt is None else _value(row, (columns.base_prompt,))
        return Row(where, _value(row, names), base_prompt)
    except InvalidRequest as error:
        return Row(where, None, error=str(error))


def _value(row: dict[str, Any], names: tuple[str, ...]) -> Prompt:
    """The first of the columns that the row has.

    Raises:
        InvalidRequest: it has none of them, or its value is not a prompt.
    """
    found = next((name for name in names if row.get(name) is not None), None)
    if found is None:
        shown = " or ".join(map(repr, names))
        raise InvalidRequest(
            f"It has no {shown}.", f"Its columns are {', '.join(map(repr, row)) or 'none'}."
        )

    value: Any = row[found]
    if not isinstance(value, str | list):
        raise InvalidRequest(f"Its {found!r} is neither text nor messages nor token ids.")
    return value

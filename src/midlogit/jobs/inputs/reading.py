"""Reads the rows of files and folders in order, one at a time; knows their formats by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from midlogit.errors import InvalidRequest
from midlogit.jobs.inputs.fields import Fields
from midlogit.jobs.inputs.lines import COMPRESSIONS, check_encoding, open_stream, read_lines
from midlogit.jobs.inputs.row import Columns, Row
from midlogit.jobs.inputs.tables import dataset_rows, is_dataset, parquet_rows

RowOf = Callable[[str, Mapping[str, Any]], Row]  # (where, values by column) to the row
TEXT = ".txt"
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
KNOWN = f"{', '.join((TEXT, *JSON_LINES))} (each also with {' or '.join(COMPRESSIONS)}), {PARQUET}"


def read_rows(
    paths: Sequence[Path], columns: Columns | None = None, encoding: str = "utf-8"
) -> Iterator[Row]:
    """The rows of files and folders, in order; each is read when it is asked for, and not kept.

    A file of text has a prompt per line, blank lines left out; if columns are named, it is read as JSON lines. A folder
    is what `datasets` saved, or its files of JSON lines and Parquet in the order of their names.

    Args:
        paths: of which at least one must hold a row. columns: names of columns. encoding: of text and JSON lines.

    Raises:
        InvalidRequest: at once for what is not there or of no known format; while reading for a file that is damaged,
            lacks a column that was named, or if there is no row at all.
        MissingExtra: while reading, for a format that needs a library which is not installed.
    """
    check_encoding(encoding)
    files = [file for path in paths for file in _files(path)]
    return _rows_of_files(files, Columns() if columns is None else columns, encoding)


def line_rows(
    stream: BinaryIO, name: str, encoding: str, row_of: RowOf | None = None
) -> Iterator[Row]:
    """The rows of a stream of text or JSON lines; it stays open.

    Args:
        name: named in errors. row_of: makes a row of the values of a JSON object; without it a line is a prompt.

    Raises:
        InvalidRequest: the stream cannot be read to its end.
    """
    for line in read_lines(stream, name, encoding):
        where = f"{name}, line {line.number}"
        if line.error is not None:
            yield Row(where, error=line.error)
        elif row_of is None:
            yield Row(where, prompt=line.text)
        else:
            yield json_row(where, line.text, row_of)


def is_text(file: Path) -> bool:
    """Whether a file's lines are prompts by its name, not JSON objects."""
    return _format(file) not in JSON_LINES


def json_row(where: str, line: str, row_of: RowOf) -> Row:
    """The row of a line that holds a JSON object, an error if it holds none."""
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Row(where, error=f"It is not JSON: {error.msg}, column {error.colno}.")
    if not isinstance(values, dict):
        return Row(where, error='It is no JSON object. Write {"prompt": …}.')
    return row_of(where, values)


def _rows_of_files(files: Sequence[Path], columns: Columns, encoding: str) -> Iterator[Row]:
    is_empty = True
    for file in files:
        for row in _rows_of_file(file, columns, encoding):
            is_empty = False
            yield row
    if is_empty:
        shown = ", ".join(map(str, files[:5])) + (", …" if len(files) > 5 else "")
        raise InvalidRequest(f"There is no prompt in {shown or 'no file'}.", "Give at least one.")


def _rows_of_file(file: Path, columns: Columns, encoding: str) -> Iterator[Row]:
    if file.is_dir():
        yield from dataset_rows(file, columns)
    elif _format(file) == PARQUET:
        yield from parquet_rows(file, columns)
    else:
        fields = Fields(columns)
        row_of = None if is_text(file) and not columns.named else fields.row
        with open_stream(file) as stream:
            yield from line_rows(stream, str(file), encoding, row_of)
        fields.require_columns(str(file))


def _files(path: Path) -> list[Path]:
    """The file itself, the folder that `datasets` saved, or the files in a folder.

    Raises:
        InvalidRequest: it is not there, of no known format, or a folder without files of one.
    """
    try:
        path.stat()
        if not path.is_dir():
            return [path] if _format(path) else _refuse(path)
        if is_dataset(path):
            return [path]
        inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise InvalidRequest(f"Cannot read {path}: {error.strerror}.") from None

    found = [file for file in inside if _format(file) in (*JSON_LINES, PARQUET)]
    if not found:
        raise InvalidRequest(
            f"{path} is a folder without {', '.join(JSON_LINES)} or {PARQUET} files.",
            "Name the files, or a folder that holds them itself.",
        )
    return found


def _refuse(path: Path) -> list[Path]:
    raise InvalidRequest(f"{path} is of no known format.", f"Its name must end in {KNOWN}.")


def _format(file: Path) -> str | None:
    """The ending of a known format, without that of a compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    is_compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    ending = "".join(suffixes[-2:-1]) if is_compressed else "".join(suffixes[-1:])
    lines = (TEXT, *JSON_LINES)
    return ending if ending in lines or (ending == PARQUET and not is_compressed) else None

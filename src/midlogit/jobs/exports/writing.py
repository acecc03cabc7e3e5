"""Files of an export: Parquet, JSON lines, a folder; written under another name and renamed when whole."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from midlogit.errors import InvalidRequest
from midlogit.jobs.exports.columns import MEANINGS
from midlogit.jobs.exports.folder import card
from midlogit.jobs.exports.results import Choices, Results, Tally, no_completion
from midlogit.jobs.files import new_file, sync, unique_name
from midlogit.jobs.part_files import KEY

if TYPE_CHECKING:
    import pyarrow as pa

Tables = Callable[[Results, Tally, Choices], "Iterator[pa.Table]"]
Lines = Callable[[Results, Tally, Choices], Iterator[dict[str, Any]]]
Write = Callable[[Results, Tally, Choices, Path], None]


def parquet(tables: Tables) -> Write:
    """Writes tables as the row groups of one Parquet file."""

    def write(results: Results, tally: Tally, choices: Choices, out: Path) -> None:
        with new_file(out, out.parent) as written:
            _write_tables(written, tables(results, tally, choices), results, tally)

    return write


def json_lines(lines: Lines) -> Write:
    """Writes one JSON object per line; numbers that JSON has not are null."""

    def write(results: Results, tally: Tally, choices: Choices, out: Path) -> None:
        with new_file(out, out.parent) as written, written.open("wb") as file:
            for line in lines(results, tally, choices):
                file.write(orjson.dumps(line, default=_plain, option=orjson.OPT_APPEND_NEWLINE))
                tally.rows += 1

    return write


def folder(tables: Tables) -> Write:
    """Writes a folder with a card and one Parquet file per table."""

    def write(results: Results, tally: Tally, choices: Choices, out: Path) -> None:
        draft = out.with_name(f"{out.name}.{unique_name()}")
        data = draft / "data"
        data.mkdir(parents=True)
        try:
            for number, table in enumerate(tables(results, tally, choices)):
                path = data / f"train-{number:05d}.parquet"
                _write_tables(path, iter([table]), results, tally)
                sync(path)
            (draft / "README.md").write_text(card(results), encoding="utf-8")
            sync(draft / "README.md")
            sync(data)
            draft.rename(out)
            sync(out.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    return write


def require_new(out: Path) -> None:
    """Refuses a target that is there already.

    Raises:
        InvalidRequest: names it.
    """
    if out.exists():
        raise InvalidRequest(f"{out} is there already.", "Name another with --out, or delete it.")


def _write_tables(path: Path, tables: Iterator[pa.Table], results: Results, tally: Tally) -> None:
    import pyarrow.parquet as pq

    first = next(tables, None)
    if first is None:
        raise no_completion()

    metadata = {"job": results.facts, "columns": _meanings(first.column_names)}
    schema = first.schema.with_metadata({KEY: orjson.dumps(metadata)})
    split, repeated = _encodings(schema)
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=3,
        use_dictionary=repeated,
        use_byte_stream_split=split,
    ) as writer:
        for table in chain((first,), tables):
            writer.write_table(table, row_group_size=len(table))
            tally.rows += len(table)


def _meanings(names: list[str]) -> Mapping[str, str]:
    return {name: MEANINGS[name] for name in names if name in MEANINGS}


def _encodings(schema: pa.Schema) -> tuple[list[str], list[str]]:
    """The paths of leaves whose bytes are split, and of those that have a dictionary."""
    import pyarrow as pa

    split: list[str] = []
    repeated: list[str] = []
    waiting = [(field.name, field.type) for field in schema]
    for path, kind in waiting:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            waiting.append((f"{path}.list.element", kind.value_type))
        elif pa.types.is_struct(kind):
            waiting += [(f"{path}.{field.name}", field.type) for field in kind]
        elif pa.types.is_floating(kind):
            split.append(path)
        else:
            repeated.append(path)
    return split, repeated


def _plain(value: Any) -> Any:
    """A value of the user's columns that JSON has no type for."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)

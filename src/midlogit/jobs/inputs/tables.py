"""Rows of Parquet files and of folders that `datasets` saved, a batch of rows at a time; knows Arrow, no prompt.

Values become Python's: lists are `list`, structs `dict`, maps lists of pairs, binary `bytes`, decimals `Decimal`, dates
and times those of `datetime` (of nanoseconds those of pandas), and dictionary-encoded values are decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midlogit.errors import InvalidRequest, MissingExtra, first_line
from midlogit.extras import require
from midlogit.jobs.inputs.fields import Fields
from midlogit.jobs.inputs.row import Columns, Row

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 16 * 2**20  # of rows that are Python values at once
MOST_ROWS = 1024
READ_BYTES = 2**20  # of each column of a Parquet file at once


def parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of a Parquet file.

    Raises:
        InvalidRequest: it is damaged, or lacks a column that was named.
    """
    pa = require("pyarrow", "batch")
    parquet = require("pyarrow.parquet", "batch")
    done = 0
    try:
        with parquet.ParquetFile(path, buffer_size=READ_BYTES) as file:
            metadata = file.metadata
            groups = map(metadata.row_group, range(metadata.num_row_groups))
            size = _rows_per_batch(sum(g.total_byte_size for g in groups), metadata.num_rows)
            for row in _rows(str(path), file.schema_arrow, file.iter_batches(size), columns):
                yield row
                done += 1
    except (OSError, pa.ArrowException) as error:
        raise InvalidRequest(
            f"Cannot read {path} beyond row {done}: {first_line(error)}.",
            "It is damaged, or no Parquet.",
        ) from None


def is_dataset(folder: Path) -> bool:
    """Whether `datasets` saved the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def dataset_rows(folder: Path, columns: Columns) -> Iterator[Row]:
    """The rows of a folder that `save_to_disk` of `datasets` wrote.

    Raises:
        InvalidRequest: it is damaged, has several splits, or lacks a column that was named.
        MissingExtra: `datasets` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name} is not installed.", "Run: pip install datasets") from None

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError) as error:  # of files, of JSON and Arrow, of its keys
        raise InvalidRequest(
            f"Cannot read {folder}: {first_line(error)}.", "It may be damaged."
        ) from None
    if isinstance(found, datasets.DatasetDict):
        found = _only_split(found, folder)
    size = _rows_per_batch(found.data.nbytes, len(found))
    batches = found.with_format("arrow").iter(size)
    yield from _rows(str(folder), found.features.arrow_schema, batches, columns)


def _only_split(splits: Any, folder: Path) -> Any:
    if len(splits) != 1:
        raise InvalidRequest(
            f"{folder} has the splits {', '.join(splits)}.",
            f"Name the folder of one, such as {folder / next(iter(splits), 'train')}.",
        )
    (only,) = splits.values()
    return only


def _rows(
    name: str,
    schema: pa.Schema,
    batches: Iterator[pa.RecordBatch] | Iterator[pa.Table],
    columns: Columns,
) -> Iterator[Row]:
    fields = Fields(columns)
    fields.begin(schema.names)
    fields.require_columns(name)

    number = 0
    for batch in batches:
        for values in _values(batch):
            number += 1
            where = f"{name}, row {number}"
            if isinstance(values, str):
                yield Row(where, error=values)
            else:
                yield fields.row(where, values)


def _values(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The values of each row by column, or why Python cannot hold them."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):
        pass
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield f"It cannot be read: {error}."


def _rows_per_batch(size: int, rows: int) -> int:
    """How many rows become Python values at once.

    Args:
        size: of all rows, in bytes.
    """
    return max(1, min(MOST_ROWS, BATCH_BYTES * rows // max(size, 1)))

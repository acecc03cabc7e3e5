"""Parts of a job as Parquet files: how they are encoded, named and read; knows no completions.

A part's results are 37 bytes per token: float32 in split bytes under zstd. Each file carries the summary of its results
in its footer, so that both appear at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from midlogit.jobs.files import new_file

if TYPE_CHECKING:
    import pyarrow as pa

KEY = b"midlogit"  # of our metadata in a footer
PLAIN_STRINGS = ("text", "prompt", "base_prompt", "error")  # that hardly repeat


def part_name(number: int) -> str:
    """The name of a part, without a suffix."""
    return f"part-{number:05d}"


def write_part(
    path: Path, scratch: Path, table: pa.Table, metadata: dict[str, Any], *, replace: bool = False
) -> None:
    """Writes a part, whole or not at all; one that is there already stays unless `replace`.

    Args:
        metadata: goes to the footer, as JSON.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    split, repeated = [], []
    for field in table.schema:
        leaf, kind = field.name, field.type
        while pa.types.is_list(kind):
            leaf, kind = f"{leaf}.list.element", kind.value_type
        if pa.types.is_float32(kind):
            split.append(leaf)
        elif pa.types.is_integer(kind) or (
            pa.types.is_string(kind) and field.name not in PLAIN_STRINGS
        ):
            repeated.append(leaf)

    with (
        new_file(path, scratch, replace=replace) as written,
        pq.ParquetWriter(
            written,
            table.schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=repeated,
            use_byte_stream_split=split,
            write_page_index=True,
            write_page_checksum=True,
        ) as writer,
    ):
        writer.write_table(table, row_group_size=max(len(table), 1))
        writer.add_key_value_metadata({KEY: orjson.dumps(metadata)})


def read_part(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The table of a part; its pages are checked against their checksums.

    Raises:
        pyarrow.ArrowException, OSError: a damaged file.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `write_part` wrote to the footer; `num_rows` is the number of rows."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        found: dict[str, Any] = orjson.loads(file.metadata.metadata.get(KEY, b"{}"))
        return {**found, "num_rows": file.metadata.num_rows}

"""Columns beside the prompts and texts of training formats: what off-policy correction needs, and the user's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from midlogit.jobs.exports.results import TEMPERATURE, Results, Tally

if TYPE_CHECKING:
    import pyarrow as pa

Columns = dict[str, "pa.Array"]

IDENTITY = ("row_id", "sample", "finish_reason", "token_ids", TEMPERATURE)
PER_TOKEN = {
    "q_logprobs": "logprobs",
    "base_logprobs": "base_tempered_logprobs",
    "teacher_logprobs": "teacher_tempered_logprobs",
    "base_bound": "base_tempered_bound",
    "teacher_bound": "teacher_tempered_bound",
}
MEANINGS = {
    TEMPERATURE: "divided the logits of both models before they were mixed",
    "q_logprobs": "log q of each id of token_ids, under the distribution that it was drawn from",
    "base_logprobs": "log-probability of each id under the base alone, at the row's temperature, unmasked",
    "teacher_logprobs": "log-probability of each id under the teacher alone, at the row's temperature, unmasked",
    "base_bound": "how far base_logprobs may be off, as servers list only some ids; 0 where it is exact",
    "teacher_bound": "how far teacher_logprobs may be off; 0 where it is exact",
}


def needed(results: Results) -> list[str]:
    """The columns of results that a row per completion is made of."""
    return [
        *results.prompt_columns,
        "sample",
        "text",
        "token_ids",
        TEMPERATURE,
        *(PER_TOKEN.values() if results.has_lists else ()),
    ]


def of_completion(table: pa.Table, results: Results) -> Columns:
    """Which completion it is, and its log-probabilities per token, one for each of `token_ids`."""
    columns = {name: table[name] for name in IDENTITY}
    if results.has_lists:
        columns |= {name: table[stored] for name, stored in PER_TOKEN.items()}
    return columns


def carried(table: pa.Table, results: Results, taken: Collection[str]) -> Columns:
    """The user's own columns, under names that mean nothing else to the format's readers.

    Args:
        taken: names of the format's own columns, and those that its readers give a meaning.
    """
    return {free_name(name, taken): table[name] for name in results.carried}


def free_name(name: str, taken: Collection[str]) -> str:
    """The name of a carried column in an export."""
    return f"input_{name}" if name in taken else name


def note_renamed(results: Results, taken: Collection[str], tally: Tally) -> None:
    """Says which of the user's columns have other names in the export."""
    renamed = [f"{name} to {free_name(name, taken)}" for name in results.carried if name in taken]
    if renamed:
        tally.notes.append(f"Columns of the input were renamed: {', '.join(renamed)}.")


def table_of(columns: Mapping[str, pa.Array]) -> pa.Table:
    """A table of columns by name."""
    import pyarrow as pa

    return pa.table(dict(columns))


def fields(column: pa.ChunkedArray | None, name: str) -> Columns:
    """The fields of a struct as columns; a column of another type is one field, of this name."""
    import pyarrow as pa

    if column is None:
        return {}
    if not pa.types.is_struct(column.type):
        return {name: column}
    whole = column.combine_chunks()
    return dict(zip((field.name for field in whole.type), whole.flatten(), strict=True))


def struct(fields: Columns) -> pa.Array:
    """Columns as the fields of one."""
    import pyarrow as pa

    arrays = [
        column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        for column in fields.values()
    ]
    return pa.StructArray.from_arrays(arrays, list(fields))

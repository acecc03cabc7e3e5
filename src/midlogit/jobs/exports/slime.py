"""Data sets for slime's RL: prompts with labels and metadata for its reward and generate functions; knows no files.

slime's policy is the base. Where the base read a prompt of its own, that is the prompt, and the teacher's is in the
metadata, where midlogit's generate function looks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from midlogit.jobs.exports import columns
from midlogit.jobs.exports.prompts import Shapes, prompt_array, require_text, survey
from midlogit.jobs.exports.results import Choices, Results, Tally, one_per_row, without_errors
from midlogit.jobs.exports.verl import ANSWERS

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = ("label", *ANSWERS)  # columns that hold the right answer, the first one first


def rl(results: Results, tally: Tally, choices: Choices) -> Iterator[pa.Table]:
    """One row per input row that has a completion: `prompt`, `label`, and `metadata` with the user's other columns."""
    shapes = survey(results)
    require_text(shapes, "slime-rl")
    for table in one_per_row(without_errors(results.read(results.prompt_columns), tally)):
        yield _table(table, results, shapes)


def _table(table: pa.Table, results: Results, shapes: Shapes) -> pa.Table:
    given = {name: table[name] for name in results.carried}
    label = next((name for name in LABELS if name in given), None)
    metadata = columns.fields(given.pop("metadata", None), "metadata")
    prompt = {"prompt": prompt_array(table, shapes.prompt)}
    if shapes.base is not None:
        metadata["teacher_prompt"] = prompt["prompt"]
        prompt = {"prompt": prompt_array(table, shapes.base, "base_prompt")}
    if label is not None:
        prompt["label"] = given.pop(label)
    return columns.table_of(
        {**prompt, "metadata": columns.struct({"row_id": table["row_id"], **given, **metadata})}
    )

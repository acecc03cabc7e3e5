"""Data sets for verl: prompts for RLHFDataset, conversations for MultiTurnSFTDataset; knows no files.

verl reads chats alone: a prompt of text becomes one user message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from midlogit.jobs.exports import columns
from midlogit.jobs.exports.prompts import (
    Shape,
    Shapes,
    prompt_array,
    require_text,
    survey,
    with_answers,
)
from midlogit.jobs.exports.results import Choices, Results, Tally, one_per_row, without_errors

if TYPE_CHECKING:
    import pyarrow as pa

DATA_SOURCE, ABILITY = "midlogit", "general"
ANSWERS = ("ground_truth", "answer")  # columns that hold the right answer, the first one first
RL_COLUMNS = ("data_source", "prompt", "ability", "reward_model", "extra_info")
READ_BY_VERL = ("messages", "images", "videos", "audios")
SFT_COLUMNS = frozenset((*READ_BY_VERL, *columns.IDENTITY, *columns.PER_TOKEN))


def rl(results: Results, tally: Tally, choices: Choices) -> Iterator[pa.Table]:
    """One row per input row that has a completion: `prompt` and the columns that reward functions get.

    `data_source`, `ability`, `reward_model` and `extra_info` are those of the input where it has them. `extra_info`
    also holds the row's id, its number, and the user's other columns.
    """
    shapes = _chats(results, "verl-rl", tally)
    first = 0
    for table in one_per_row(without_errors(results.read(results.prompt_columns), tally)):
        yield _rl_table(table, results, shapes.prompt, first)
        first += len(table)


def sft(results: Results, tally: Tally, choices: Choices) -> Iterator[pa.Table]:
    """One row per completion: `messages`, the prompt's and the assistant's."""
    shapes = _chats(results, "verl-sft", tally)
    columns.note_renamed(results, SFT_COLUMNS, tally)

    for table in without_errors(results.read(columns.needed(results)), tally):
        yield columns.table_of(
            {
                "messages": with_answers(table, shapes.prompt),
                **columns.of_completion(table, results),
                **columns.carried(table, results, SFT_COLUMNS),
            }
        )
    if tally.truncated:
        tally.notes.append(
            f"{tally.truncated} completions have finish_reason length; the chat template ends them like the others."
        )


def _chats(results: Results, name: str, tally: Tally) -> Shapes:
    """The forms of the prompts, text as messages."""
    shapes = survey(results, as_chat=True)
    require_text(shapes, name)
    if shapes.had_text:
        tally.notes.append("Prompts of text became user messages, which verl renders as a chat.")
    return shapes


def _rl_table(table: pa.Table, results: Results, shape: Shape, first: int) -> pa.Table:
    """Rows for RLHFDataset.

    Args:
        first: number of the first row.
    """
    import pyarrow as pa

    given = {name: table[name] for name in results.carried}
    extra = columns.fields(given.pop("extra_info", None), "extra_info")
    row = {
        "data_source": _all(DATA_SOURCE, table),
        "prompt": prompt_array(table, shape),
        "ability": _all(ABILITY, table),
        "reward_model": _reward_model(given, table),
    }
    row |= {name: given.pop(name) for name in list(given) if name in RL_COLUMNS}
    extra = {
        "row_id": table["row_id"],
        "index": pa.array(range(first, first + len(table)), pa.int64()),
        **given,
        **extra,
    }
    return columns.table_of({**row, "extra_info": columns.struct(extra)})


def _reward_model(given: columns.Columns, table: pa.Table) -> pa.Array:
    """The rule and the right answer, empty where the input names none."""
    found = next((given[name] for name in ANSWERS if name in given), None)
    truth = _all("", table) if found is None else found
    return columns.struct({"style": _all("rule", table), "ground_truth": truth})


def _all(value: str, table: pa.Table) -> pa.Array:
    import pyarrow as pa

    return pa.repeat(value, len(table))

"""Data sets for TRL: prompts with completions for SFTTrainer, and prompts alone for GRPO and its kin; knows no files.

Prompt and completion are columns of their own, because SFTTrainer then trains on the completion alone by default.
With `messages` it would train on every token, or need a chat template that marks the assistant's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from midlogit.jobs.exports import columns
from midlogit.jobs.exports.prompts import Shapes, answers, prompt_array, require_text, survey
from midlogit.jobs.exports.results import Choices, Results, Tally, one_per_row, without_errors

if TYPE_CHECKING:
    import pyarrow as pa

# Names by which TRL tells kinds of data sets apart.
READ_BY_TRL = frozenset(
    (
        "prompt",
        "completion",
        "messages",
        "text",
        "chosen",
        "rejected",
        "conversations",
        "image",
        "images",
        "input_ids",
        "labels",
        "completion_mask",
        "assistant_masks",
        "seq_lengths",
        "position_ids",
    )
)
SFT_COLUMNS = READ_BY_TRL.union(columns.IDENTITY, columns.PER_TOKEN, ("base_prompt",))
PROMPT_COLUMNS = READ_BY_TRL.union(("base_prompt", "row_id"))


def sft(results: Results, tally: Tally, choices: Choices) -> Iterator[pa.Table]:
    """One row per completion: `prompt` and `completion`, conversations where the prompts are chats, else text."""
    shapes = survey(results)
    require_text(shapes, "trl-sft")
    columns.note_renamed(results, SFT_COLUMNS, tally)

    for table in without_errors(results.read(columns.needed(results)), tally):
        is_text = shapes.prompt.form == "text"
        yield columns.table_of(
            {
                "prompt": prompt_array(table, shapes.prompt),
                "completion": table["text"] if is_text else answers(table),
                **_base_prompt(table, shapes),
                **columns.of_completion(table, results),
                **columns.carried(table, results, SFT_COLUMNS),
            }
        )
    if tally.truncated:
        tally.notes.append(
            f"{tally.truncated} completions have finish_reason length; SFTTrainer ends them with a stop token, too."
        )


def prompt(results: Results, tally: Tally, choices: Choices) -> Iterator[pa.Table]:
    """One row per input row that has a completion: `prompt`, and the user's columns for reward functions."""
    shapes = survey(results)
    require_text(shapes, "trl-prompt")
    columns.note_renamed(results, PROMPT_COLUMNS, tally)

    for table in one_per_row(without_errors(results.read(results.prompt_columns), tally)):
        yield columns.table_of(
            {
                "prompt": prompt_array(table, shapes.prompt),
                **_base_prompt(table, shapes),
                "row_id": table["row_id"],
                **columns.carried(table, results, PROMPT_COLUMNS),
            }
        )


def _base_prompt(table: pa.Table, shapes: Shapes) -> columns.Columns:
    if shapes.base is None:
        return {}
    return {"base_prompt": prompt_array(table, shapes.base, "base_prompt")}

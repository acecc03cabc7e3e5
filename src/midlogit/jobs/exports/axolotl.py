"""A tokenized data set for axolotl's distillation plugin: ids, labels and candidates per position; knows no files.

The plugin's own prompt strategies tokenize messages anew, line candidates up from the end, and mask them one position
late. A data set that has `input_ids`, `attention_mask` and `labels` passes as it is. So ids here are those that were
sampled, and the candidates of a token stand one position before it, where the plugin's loss expects them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from midlogit.errors import InvalidRequest
from midlogit.jobs.exports import columns
from midlogit.jobs.exports.results import Choices, Results, Tally, in_slices, without_errors
from midlogit.jobs.exports.tokenizer import PromptReader

if TYPE_CHECKING:
    import pyarrow as pa

NEEDED = (
    "row_id",
    "prompt",
    "prompt_form",
    "prompt_tokens",
    "token_ids",
    "finish_reason",
    "error",
)
SIDES = ("q", "teacher")
IGNORED = -100  # the label of a position that has no loss
Array = np.ndarray[Any, Any]


def kd(results: Results, tally: Tally, choices: Choices) -> Iterator[pa.Table]:
    """One row per completion: prompt and completion as ids, with q*'s or the teacher's candidates.

    Raises:
        InvalidRequest: the job stored no candidates, or prompts cannot be encoded as they were.
    """
    if choices.top_of not in SIDES:
        raise InvalidRequest(
            f"There are no candidates of {choices.top_of!r}.", "Take q or teacher."
        )
    if not results.manifest.params.top_logprobs:
        raise InvalidRequest(
            "axolotl-kd needs candidates at each position, and the job stored none.",
            "Run it with --top-logprobs, up to 256.",
        )
    reader = PromptReader.open(results, choices.tokenizer)
    side = choices.top_of
    temperature = results.manifest.params.temperature
    if side == "teacher" and temperature != 1:
        tally.notes.append(
            f"The teacher's candidates are at temperature 1, and the job sampled at {temperature:g}."
        )

    tables = results.read([*NEEDED, f"top_{side}_ids", f"top_{side}_logprobs"])
    for table in without_errors(in_slices(tables), tally):
        yield _table(table, reader.read(table), side)
    tally.notes.append(
        "In axolotl's configuration the file is a dataset without a type, and kd_temperature is 1.0."
    )


def _table(table: pa.Table, prompts: list[list[int]], side: str) -> pa.Table:
    """The rows of some completions.

    Args:
        prompts: the ids of each prompt.
    """
    import pyarrow as pa

    completions = [ids.values.to_numpy() for ids in table["token_ids"]]
    pairs = list(zip(prompts, completions, strict=True))
    lengths = np.array([len(prompt) + len(ids) for prompt, ids in pairs])
    inputs = np.concatenate([part for pair in pairs for part in pair])
    labels = np.concatenate(
        [part for prompt, ids in pairs for part in (np.full(len(prompt), IGNORED), ids)]
    )

    ids, logprobs, counts = _candidates(table, side)
    is_scored = np.roll(labels != IGNORED, -1)  # positions that predict a token of the completion
    counts_of_positions = np.zeros(len(inputs), np.int64)
    counts_of_positions[is_scored] = counts

    def nested(values: Array) -> pa.Array:
        return _lists(_lists(pa.array(values), counts_of_positions), lengths)

    return columns.table_of(
        {
            "input_ids": _lists(pa.array(inputs, pa.int32()), lengths),
            "attention_mask": _lists(pa.array(np.ones(len(inputs), np.int8)), lengths),
            "labels": _lists(pa.array(labels, pa.int32()), lengths),
            "target_token_ids": nested(ids),
            "target_logprobs": nested(logprobs),
            "target_mask": nested(np.ones(len(ids), np.int8)),
        }
    )


def _candidates(table: pa.Table, side: str) -> tuple[Array, Array, Array]:
    """The candidates of all positions, normalised at each as the plugin's own strategies do.

    Returns:
        (ids, log-probabilities, number of candidates at each position)
    """
    by_position = table[f"top_{side}_logprobs"].combine_chunks().flatten()
    counts = by_position.value_lengths().to_numpy()
    logprobs = by_position.flatten().to_numpy().astype(np.float64)
    ids = table[f"top_{side}_ids"].combine_chunks().flatten().flatten().to_numpy()

    starts = (np.cumsum(counts) - counts)[counts > 0]
    seen = counts[counts > 0]
    most = np.repeat(np.maximum.reduceat(logprobs, starts), seen)
    total = np.add.reduceat(np.exp(logprobs - most), starts)
    return ids, (logprobs - most - np.repeat(np.log(total), seen)).astype(np.float32), counts


def _lists(values: pa.Array, lengths: Array) -> pa.Array:
    """A column of lists of these lengths."""
    import pyarrow as pa

    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)

"""Results as JSON lines: every completion and every column, errors among them; knows no files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from midlogit.jobs.exports.results import Choices, Results, Tally, in_slices
from midlogit.jobs.schema import prompt_of


def lines(results: Results, tally: Tally, choices: Choices) -> Iterator[dict[str, Any]]:
    """One line per completion; prompts in their own form."""
    for table in in_slices(results.read(results.schema.names)):
        for row in table.to_pylist():
            for side in ("prompt", "base_prompt"):
                row[side] = prompt_of(row[side], row[f"{side}_form"])
            tally.errors += row["error"] is not None
            yield row

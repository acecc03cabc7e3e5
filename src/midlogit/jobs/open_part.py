"""A part that is being worked on: its items, what is finished of them, and its commit; knows no engine.

Finished completions come from the journals of earlier attempts, and new ones go to a journal of this one. When all are
there, the part becomes one immutable file of results.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from midlogit.jobs.inputs import with_overrides
from midlogit.jobs.journal import Journal, journals_of, read_journals
from midlogit.jobs.manifest import Manifest
from midlogit.jobs.part_files import read_part, write_part
from midlogit.jobs.run_folder import RunFolder
from midlogit.jobs.schema import (
    PLANNED_COLUMNS,
    Layout,
    Record,
    error_record,
    prompt_of,
    records_of,
    results_table,
)
from midlogit.jobs.summary import SUMMARY_VERSION, summarize
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Prompt

if TYPE_CHECKING:
    import pyarrow as pa

PLAN_ONLY = ("samples", "overrides", "where", "row_error")  # columns that results do not have

Item = tuple[int, int]  # (row of the part, sample)


@dataclass(frozen=True, slots=True)
class InputRow:
    """An input row as it was planned.

    Attributes:
        where: its file and line. samples: completions to make. params: of its sampling.
        error: why it cannot be honoured.
    """

    row_id: str
    where: str
    prompt: Prompt | None
    base_prompt: Prompt | None
    samples: int
    params: SamplingParams
    error: str | None


class OpenPart:
    """A part that is being worked on.

    Args:
        retry: make the items again that ended as errors, of a part that is done.

    Attributes:
        number: of the part. rows: its input rows. layout: of its results.
        missing: the items that are not finished, in the order of the rows.
    """

    def __init__(
        self, folder: RunFolder, manifest: Manifest, number: int, *, retry: bool = False
    ) -> None:
        self.number = number
        self._folder = folder
        self._manifest = manifest
        self._retry = retry
        self._started = time.time()

        self._table = read_part(folder.rows_file(number))
        self.layout = layout_of(manifest, self._table.schema)
        own = self._table.select([*PLANNED_COLUMNS, *PLAN_ONLY])
        params = manifest.params
        self.rows = [_input_row(row, params) for row in own.to_pylist()]
        self.missing: dict[Item, None] = dict.fromkeys(
            (number, sample)
            for number, row in enumerate(self.rows)
            for sample in range(row.samples)
        )

        self._records: dict[Item, Record] = {}
        for item, record in self._earlier():
            if item in self.missing and not (retry and record["error"] is not None):
                self._take(item, record)
        self._journal = Journal(folder.journal, number)
        self._finish_wrong_rows()

    @property
    def num_errors(self) -> int:
        """Finished items that are errors."""
        return sum(record["error"] is not None for record in self._records.values())

    def finish(self, item: Item, record: Record) -> None:
        """Takes the record of an item, which from then on survives a crash."""
        self._journal.append(item[0], record)
        self._take(item, record)

    def commit(self) -> dict[str, Any]:
        """Writes the results of the part, of which nothing is missing, and removes its journals.

        Returns:
            The metadata in the footer of the results, its summary among them.
        """
        items = sorted(self._records)
        table = results_table(
            self._table.drop_columns(list(PLAN_ONLY)),
            [row for row, _ in items],
            [self._records[item] for item in items],
            self.layout,
        )
        metadata = {
            "fingerprint": self._manifest.fingerprint,
            "part": self.number,
            "started": self._started,
            "ended": time.time(),
            "summary_version": SUMMARY_VERSION,
            "summary": summarize(table),
        }
        path = self._folder.results_file(self.number)
        write_part(path, self._folder.scratch, table, metadata, replace=self._retry)

        self._journal.close()
        for journal in journals_of(self._folder.journal, self.number):
            journal.unlink(missing_ok=True)
        return metadata

    def leave(self) -> None:
        """Leaves the part as it is; what is finished stays in its journals."""
        self._journal.sync()
        self._journal.close()

    def _take(self, item: Item, record: Record) -> None:
        self._records[item] = record
        del self.missing[item]

    def _earlier(self) -> Iterator[tuple[Item, Record]]:
        """What earlier attempts finished: in the results, where the part is done, and in journals."""
        if self._retry:
            results = read_part(self._folder.results_file(self.number))
            rows = {row.row_id: number for number, row in enumerate(self.rows)}
            names = results.column("row_id").to_pylist()
            for name, record in zip(names, records_of(results, self.layout), strict=True):
                yield (rows[name], record["sample"]), record
        for number, record in read_journals(self._folder.journal, self.number):
            yield (number, record["sample"]), record

    def _finish_wrong_rows(self) -> None:
        """Makes error records of the rows that the plan found wrong."""
        for number, sample in list(self.missing):
            row = self.rows[number]
            if row.error is not None:
                message = f"{row.where}: {row.error}"
                seed = row.params.seed or 0
                self._take((number, sample), error_record(sample, seed, message, self.layout))


def layout_of(manifest: Manifest, planned: pa.Schema) -> Layout:
    """The layout of a job's results.

    Args:
        planned: the schema of a part's input rows.
    """
    import pyarrow as pa

    own = {*PLANNED_COLUMNS, *PLAN_ONLY}
    carried = pa.schema([field for field in planned if field.name not in own])
    return Layout(manifest.diagnostics, manifest.params.top_logprobs, carried)


def _input_row(row: dict[str, Any], params: SamplingParams) -> InputRow:
    overrides = json.loads(row["overrides"] or "{}")
    return InputRow(
        row_id=row["row_id"],
        where=row["where"],
        prompt=prompt_of(row["prompt"], row["prompt_form"]),
        base_prompt=prompt_of(row["base_prompt"], row["base_prompt_form"]),
        samples=row["samples"],
        params=with_overrides(params, overrides),
        error=row["row_error"],
    )

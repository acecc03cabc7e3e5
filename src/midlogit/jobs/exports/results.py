"""The results of a job as exports read them, and what is counted on the way; knows no format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midlogit.errors import InvalidRequest, first_line
from midlogit.jobs.job import Job
from midlogit.jobs.part_files import read_part
from midlogit.jobs.run_folder import RunFolder
from midlogit.jobs.schema import OWN_COLUMNS, PLANNED_COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa

TEMPERATURE = "temperature"
FACTS = ("sampling", "reading", "engine", "dtype", "base", "teacher")  # of the parameters
SLICE = 64


class Results:
    """The results of a complete job.

    Attributes:
        manifest: what the job is.
        schema: of the columns: those that are stored, and the temperature of each row.

    Raises:
        InvalidRequest: parts are missing or damaged.
    """

    def __init__(self, job: Job) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if missing := job.missing():
            raise InvalidRequest(
                f"{len(missing)} of {job.manifest.parts} parts of {job.path} are not done.",
                f"Run the job to its end; any reader of Parquet reads {job.path / 'data'} before.",
            )
        self.manifest = job.manifest
        self._job, self._folder = job, RunFolder(job.path)
        with self._reading():
            stored = pq.read_schema(self._folder.results_file(0)).remove_metadata()
        self.schema = stored.append(pa.field(TEMPERATURE, pa.float64()))

    @property
    def carried(self) -> list[str]:
        """The user's own columns."""
        return [
            name for name in self.schema.names if name not in OWN_COLUMNS and name != TEMPERATURE
        ]

    @property
    def prompt_columns(self) -> list[str]:
        """The columns of an input row, and those that tell whether it has a completion."""
        return [*PLANNED_COLUMNS, "finish_reason", "error", *self.carried]

    @property
    def facts(self) -> dict[str, Any]:
        """What the job is, for readers of an export."""
        return {
            "midlogit": self.manifest.version,
            "planned": self.manifest.created,
            "fingerprint": self.manifest.fingerprint,
            **{name: value for name, value in self.manifest.parameters.items() if name in FACTS},
        }

    @property
    def has_lists(self) -> bool:
        """Whether log-probabilities per token were stored."""
        return self.manifest.diagnostics != "none"

    def read(self, columns: list[str]) -> Iterator[pa.Table]:
        """The tables of results, one per part in the order of the input.

        Args:
            columns: the ones that are read; names in `schema`.

        Raises:
            InvalidRequest: a part is damaged.
        """
        stored = [name for name in columns if name != TEMPERATURE]
        with self._reading():
            for part, table in enumerate(self._job.tables(stored)):
                if TEMPERATURE in columns:
                    table = table.append_column(TEMPERATURE, self._temperatures(part, table))
                yield table

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns the errors of damaged files into one that says what to do."""
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise InvalidRequest(
                f"The results of {self._job.path} cannot be read: {first_line(error)}",
                "midlogit batch verify names the parts that are damaged.",
            ) from error

    def _temperatures(self, part: int, table: pa.Table) -> pa.Array:
        """The temperature of each completion of a part: its row's own, else the job's."""
        import pyarrow as pa

        rows = read_part(self._folder.rows_file(part), ["row_id", "overrides"])
        own = {
            row_id: json.loads(overrides).get(TEMPERATURE)
            for row_id, overrides in zip(*(column.to_pylist() for column in rows), strict=True)
            if overrides is not None
        }
        usual = self.manifest.params.temperature
        given = (own.get(row_id) for row_id in table["row_id"].to_pylist())
        return pa.array([usual if t is None else t for t in given], pa.float64())


def no_completion() -> InvalidRequest:
    """The error of a job that has nothing for a trainer."""
    return InvalidRequest("The job has no completion: every row is an error.", "Export jsonl.")


@dataclass(frozen=True, slots=True)
class Choices:
    """Choices that one format alone has.

    Attributes:
        top_of: whose candidates axolotl-kd takes, "q" or "teacher".
        tokenizer: folder or hub id of the teacher's tokenizer, for axolotl-kd; None for the bundled one.
    """

    top_of: str = "q"
    tokenizer: str | Path | None = None


@dataclass(slots=True)
class Tally:
    """Counts of an export.

    Attributes:
        rows: written. errors: completions left out because they ended as errors.
        truncated: completions among those written that max_tokens or the context window ended.
        notes: sentences for the user.
    """

    rows: int = 0
    errors: int = 0
    truncated: int = 0
    notes: list[str] = field(default_factory=list)


def in_slices(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The tables in slices of SLICE completions, for what takes many times the memory of Arrow."""
    for table in tables:
        for first in range(0, len(table), SLICE):
            yield table.slice(first, SLICE)


def without_errors(tables: Iterator[pa.Table], tally: Tally) -> Iterator[pa.Table]:
    """The tables without error rows, which are counted."""
    import pyarrow.compute as pc

    for table in tables:
        good = table.filter(pc.is_null(table["error"]))
        tally.errors += len(table) - len(good)
        tally.truncated += pc.sum(pc.equal(good["finish_reason"], "length")).as_py() or 0
        if len(good):
            yield good


def one_per_row(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The first completion of each input row; those of a row follow each other."""
    import pyarrow as pa

    last = None
    for table in tables:
        ids = table["row_id"].to_pylist()
        is_first = [row_id != before for before, row_id in zip([last, *ids[:-1]], ids, strict=True)]
        last = ids[-1]
        kept = table.filter(pa.array(is_first))
        if len(kept):
            yield kept

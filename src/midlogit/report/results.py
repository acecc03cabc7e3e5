"""What a report reads: the results of a job, or the lines of `generate --json`, part by part; knows no page.

A part gives its summary, from its footer where that holds one of this version, and its rows on request. Parts of a job
that are not whole yet are read from their journals, so a report of a running job says what is finished by now.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midlogit.errors import InvalidRequest, first_line
from midlogit.extras import require
from midlogit.jobs.attempts import Attempts
from midlogit.jobs.claims import heartbeats
from midlogit.jobs.job import Job
from midlogit.jobs.journal import journals_of, read_journals
from midlogit.jobs.manifest import Manifest
from midlogit.jobs.open_part import PLAN_ONLY, layout_of
from midlogit.jobs.part_files import read_metadata, read_part
from midlogit.jobs.run_folder import RunFolder
from midlogit.jobs.schema import results_table
from midlogit.jobs.summary import SUMMARY_VERSION, Summary, merge, summarize
from midlogit.report.lines import Piece, line_parts, table_of_lines

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLED_PARTS = 32  # whose lists are read where all would be too many
LISTED = ("examples", "highest_kl")  # of a summary, whose entries must find their part again

Table = Callable[[list[str] | None], "pa.Table"]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the results.

    Attributes:
        table: reads its rows, all columns or those named that it has. metadata: of its footer, where it has one.
        is_open: not whole yet.
    """

    table: Table
    metadata: dict[str, Any] = field(default_factory=dict)
    is_open: bool = False


@dataclass(frozen=True)
class Results:
    """All results of a run.

    Attributes:
        name: as the page shows it. manifest: of a job; None for lines of JSON.
        parts: in the order of the input. summary: of all of them together; entries that name a row have its `part`.
        remade: parts whose summary was made from their rows, as their footer has none of this version.
        started, ended: of the work on whole parts, seconds since the epoch; None where there is none.
        deaths: of engines, all together. workers: that are at work.
    """

    name: str
    manifest: Manifest | None
    parts: list[Part]
    summary: Summary
    remade: int = 0
    started: float | None = None
    ended: float | None = None
    deaths: int = 0
    workers: int = 0

    @property
    def has_lists(self) -> bool:
        """Whether diagnostics are stored for each token."""
        return bool(self.summary.get("tokens"))

    def sampled_parts(self, most: int = SAMPLED_PARTS) -> list[int]:
        """The numbers of a random sample of parts, the same each time; all where there are no more."""
        if len(self.parts) <= most:
            return list(range(len(self.parts)))
        return sorted(random.Random(0).sample(range(len(self.parts)), most))


def open_results(path: str | Path) -> Results:
    """Reads the summaries of a job's folder, or of a file of `generate --json`.

    Raises:
        InvalidRequest: neither, or a damaged file. MissingExtra: pyarrow is not installed.
    """
    require("pyarrow", "report")
    import pyarrow as pa

    path = Path(path)
    try:
        return _of_lines(path) if path.is_file() else _of_job(path)
    except pa.ArrowException as error:
        raise InvalidRequest(
            f"{path} has a damaged part: {first_line(error)}.",
            "midlogit batch verify RUN names it.",
        ) from error


def _of_lines(path: Path) -> Results:
    parts: list[Part] = []

    def summaries() -> Iterator[Summary]:
        for number, piece in enumerate(line_parts(path)):
            parts.append(Part(partial(_lines, piece)))
            yield _placed(summarize(table_of_lines(piece)), number)

    return Results(path.name, None, parts, merge(summaries()))


def _of_job(path: Path) -> Results:
    job, folder = Job.open(path), RunFolder(path)
    parts: list[Part] = []
    remade = 0

    def summaries() -> Iterator[Summary]:
        nonlocal remade
        for number in range(job.manifest.parts):
            part, summary, is_remade = _part_of_job(folder, job.manifest, number)
            if part is not None and summary is not None:
                remade += is_remade
                yield _placed(summary, len(parts))
                parts.append(part)

    summary = merge(summaries())
    times = [part.metadata for part in parts if "ended" in part.metadata]
    return Results(
        name=path.resolve().name,
        manifest=job.manifest,
        parts=parts,
        summary=summary,
        remade=remade,
        started=min((m["started"] for m in times), default=None),
        ended=max((m["ended"] for m in times), default=None),
        deaths=sum(Attempts(folder).count(number) for number in range(job.manifest.parts)),
        workers=len(heartbeats(folder)),
    )


def _part_of_job(
    folder: RunFolder, manifest: Manifest, number: int
) -> tuple[Part | None, Summary | None, bool]:
    """A part, its summary, and whether that was made from its rows; None and None where nothing is finished."""
    path = folder.results_file(number)
    if path.exists():
        metadata = read_metadata(path)
        summary = metadata.pop("summary", None)
        part = Part(partial(_stored, path), metadata)
        if metadata.get("summary_version") == SUMMARY_VERSION:
            return part, summary, False
        return part, summarize(read_part(path)), True

    if not journals_of(folder.journal, number):
        return None, None, False
    table = _journal_table(folder, manifest, number)
    if table is None:
        return _part_of_job(folder, manifest, number) if path.exists() else (None, None, False)
    return Part(partial(_selected, table), is_open=True), summarize(table), False


def _journal_table(folder: RunFolder, manifest: Manifest, number: int) -> pa.Table | None:
    """The results in the journals of a part; None for none."""
    records = {
        (row, record["sample"]): record for row, record in read_journals(folder.journal, number)
    }
    if not records:
        return None
    rows = read_part(folder.rows_file(number))
    items = sorted(records)
    return results_table(
        rows.drop_columns(list(PLAN_ONLY)),
        [row for row, _ in items],
        [records[item] for item in items],
        layout_of(manifest, rows.schema),
    )


def _lines(piece: Piece, names: list[str] | None) -> pa.Table:
    return _selected(table_of_lines(piece), names)


def _stored(path: Path, names: list[str] | None) -> pa.Table:
    import pyarrow.parquet as pq

    if names is None:
        return read_part(path)
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        stored = set(file.schema_arrow.names)
        return file.read([name for name in names if name in stored])


def _selected(table: pa.Table, names: list[str] | None) -> pa.Table:
    if names is None:
        return table
    return table.select([name for name in names if name in table.column_names])


def _placed(summary: Summary, part: int) -> Summary:
    """A summary whose entries of rows say which part they are in."""
    lists = [summary[name] for name in LISTED] + list(summary["extremes"].values())
    for entry in (entry for entries in lists for entry in entries):
        entry["part"] = part
    return summary

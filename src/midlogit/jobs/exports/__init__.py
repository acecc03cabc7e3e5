"""Exports of a job's results: one module per format, the files they write, and the table of formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from midlogit.errors import InvalidRequest
from midlogit.jobs.errors import storing
from midlogit.jobs.exports import axolotl, folder, jsonl, openai, slime, trl, verl, writing
from midlogit.jobs.exports.results import Choices, Results, Tally
from midlogit.jobs.job import Job

__all__ = ["FORMATS", "Exported", "Format", "export"]


@dataclass(frozen=True, slots=True)
class Format:
    """A format of exports.

    Attributes:
        suffix: of its files; empty for a folder.
    """

    suffix: str
    write: writing.Write


KD = "axolotl-kd"
FORMATS: dict[str, Format] = {
    "trl-sft": Format(".parquet", writing.parquet(trl.sft)),
    "trl-prompt": Format(".parquet", writing.parquet(trl.prompt)),
    "verl-rl": Format(".parquet", writing.parquet(verl.rl)),
    "verl-sft": Format(".parquet", writing.parquet(verl.sft)),
    "slime-rl": Format(".parquet", writing.parquet(slime.rl)),
    KD: Format(".parquet", writing.parquet(axolotl.kd)),
    "openai": Format(".jsonl", writing.json_lines(openai.answers)),
    "jsonl": Format(".jsonl", writing.json_lines(jsonl.lines)),
    "datasets": Format("", writing.folder(folder.tables)),
}


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: the file or folder. rows: written.
        errors: completions that ended as errors: left out of training formats, marked in others.
        notes: sentences for the user.
    """

    path: Path
    rows: int
    errors: int
    notes: tuple[str, ...]


def export(
    job: Job,
    to: str,
    out: str | Path | None = None,
    *,
    top_of: str | None = None,
    tokenizer: str | Path | None = None,
) -> Exported:
    """Writes the results of a complete job in a format, part by part.

    Args:
        to: a name in FORMATS.
        out: the new file or folder; by default one named like the format in RUN/exports.
        top_of: whose candidates axolotl-kd takes, "q" or "teacher"; by default those of q*.
        tokenizer: folder or hub id of the teacher's tokenizer, for axolotl-kd; by default the bundled teacher's.

    Raises:
        InvalidRequest: no such format, a job that is not complete, a file that is there already, or results that the
            format cannot hold. ModelUnavailable: no such tokenizer. StorageFailure: the disk is full or read-only.
    """
    if to not in FORMATS:
        raise InvalidRequest(f"There is no format {to!r}.", f"Take one of {', '.join(FORMATS)}.")
    if to != KD and not (top_of is None and tokenizer is None):
        raise InvalidRequest(f"{to} has no candidates.", f"Leave --top-of and --tokenizer to {KD}.")

    results, tally = Results(job), Tally()
    choices = Choices(top_of or "q", tokenizer)
    path = job.path / "exports" / f"{to}{FORMATS[to].suffix}" if out is None else Path(out)
    with storing(path):
        writing.require_new(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        FORMATS[to].write(results, tally, choices, path)
    return Exported(path, tally.rows, tally.errors, tuple(tally.notes))

"""The state of a job from its files alone, from any machine; opens no model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from midlogit.jobs.claims import heartbeats
from midlogit.jobs.journal import journals_of, read_journals
from midlogit.jobs.manifest import Manifest
from midlogit.jobs.part_files import read_metadata
from midlogit.jobs.run_folder import RunFolder
from midlogit.jobs.summary import Summary

SHOWN = ("completions", "completion_tokens", "errors", "error_examples")  # of a part's summary


@dataclass(frozen=True, slots=True)
class Status:
    """What is done of a job.

    Attributes:
        items, done: completions to make, and made. errors: of those made, ended as errors.
        tokens: generated so far. parts, parts_done: likewise of parts.
        tokens_per_s: of all workers together, over the last minutes. workers: heartbeats of those that live.
        seconds_left: at that rate; None without one.
        error_examples: some errors.
    """

    items: int
    done: int
    errors: int
    tokens: int
    parts: int
    parts_done: int
    tokens_per_s: float
    seconds_left: float | None
    workers: list[dict[str, Any]] = field(default_factory=list)
    error_examples: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether every part is done."""
        return self.parts_done == self.parts

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "is_complete": self.is_complete}


class StatusReader:
    """Reads the state of a job again and again; the footer of a finished part only once."""

    def __init__(self, folder: RunFolder, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._footers: dict[tuple[Path, int], Summary] = {}

    def read(self) -> Status:
        """The state now."""
        done = self._folder.done()
        finished = self._summaries(done)
        items = sum(summary["completions"] for summary in finished)
        tokens = sum(summary["completion_tokens"] for summary in finished)
        errors = sum(summary["errors"] for summary in finished)
        examples = [e for summary in finished for e in summary["error_examples"]]

        for part in sorted(set(range(self._manifest.parts)) - done):
            if not journals_of(self._folder.journal, part):
                continue
            records = {
                (row, record["sample"]): record
                for row, record in read_journals(self._folder.journal, part)
            }
            items += len(records)
            tokens += sum(record["completion_tokens"] for record in records.values())
            wrong = [r["error"] for r in records.values() if r["error"] is not None]
            errors, examples = errors + len(wrong), examples + wrong

        workers = heartbeats(self._folder)
        rate = sum(worker["tokens_per_s"] for worker in workers)
        left = self._manifest.items - items
        per_item = tokens / items if items else 0.0
        return Status(
            items=self._manifest.items,
            done=items,
            errors=errors,
            tokens=tokens,
            parts=self._manifest.parts,
            parts_done=len(done),
            tokens_per_s=rate,
            seconds_left=left * per_item / rate if rate and items else None,
            workers=workers,
            error_examples=list(dict.fromkeys(examples))[:5],
        )

    def errors_of_done_parts(self) -> int:
        """Completions of finished parts that ended as errors."""
        return sum(summary["errors"] for summary in self._summaries(self._folder.done()))

    def _summaries(self, parts: set[int]) -> list[Summary]:
        """What the footers of finished parts say, as far as the state needs it."""
        return [self._summary(self._folder.results_file(part)) for part in sorted(parts)]

    def _summary(self, path: Path) -> Summary:
        written = path.stat().st_mtime_ns  # `retry` replaces files
        if (path, written) not in self._footers:
            summary = read_metadata(path)["summary"]
            self._footers[path, written] = {name: summary[name] for name in SHOWN}
        return self._footers[path, written]

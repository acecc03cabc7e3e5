"""The folder of a job: where its files are, and what their names say; reads only what it is asked for."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from midlogit.errors import InvalidRequest
from midlogit.jobs.files import is_abandoned
from midlogit.jobs.manifest import Manifest
from midlogit.jobs.part_files import part_name


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a job.

    Attributes:
        path: RUN.
    """

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan"

    @property
    def data(self) -> Path:
        """The results: one Parquet file per finished part, in the order of the input."""
        return self.path / "data"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def claims(self) -> Path:
        return self.path / "claims"

    @property
    def workers(self) -> Path:
        return self.path / "workers"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def scratch(self) -> Path:
        """Files that are being written; readers of the results must not see them."""
        return self.path / "tmp"

    @property
    def is_planned(self) -> bool:
        return self.plan.exists()

    def rows_file(self, part: int) -> Path:
        """The input rows of a part."""
        return self.plan / f"{part_name(part)}.parquet"

    def results_file(self, part: int) -> Path:
        """The results of a part, once it is done."""
        return self.data / f"{part_name(part)}.parquet"

    def done(self) -> set[int]:
        """The numbers of the parts that are done."""
        return {int(path.stem.removeprefix("part-")) for path in self.data.glob("part-*.parquet")}

    def manifest(self) -> Manifest:
        """Reads the manifest.

        Raises:
            InvalidRequest: there is no job in the folder.
        """
        if not self.is_planned:
            raise InvalidRequest(
                f"{self.path} holds no job.", "midlogit batch run INPUT --out RUN begins one."
            )
        return Manifest.read(self.plan / "manifest.json")

    def make(self) -> None:
        """Makes the folders of a job, and removes what processes of this machine left behind when they died."""
        for folder in (self.data, self.journal, self.claims, self.workers, self.attempts):
            folder.mkdir(parents=True, exist_ok=True)

        for path in [*self.path.glob("plan.*"), *self.scratch.glob("*"), *self.workers.glob("*")]:
            if not is_abandoned(path.name):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def require_usable(self) -> None:
        """Refuses a folder that holds something else than a job.

        Raises:
            InvalidRequest: names what it holds.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InvalidRequest(f"{self.path} is a file.", "Name a folder.")
        if self.is_planned or not self.path.exists():
            return
        foreign = [p.name for p in self.path.iterdir() if not p.name.startswith(("plan.", "."))]
        if foreign:
            raise InvalidRequest(
                f"{self.path} holds no job but {', '.join(sorted(foreign)[:3])}.",
                "Name a new folder.",
            )

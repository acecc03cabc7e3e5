"""A batch job in a folder: planned once, run any number of times until it is complete, then read.

Knows the order of the steps; the modules beside it know each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midlogit.errors import InvalidRequest
from midlogit.extras import require
from midlogit.jobs.claims import Presence
from midlogit.jobs.errors import storing
from midlogit.jobs.files import write_whole
from midlogit.jobs.manifest import Manifest
from midlogit.jobs.options import JobOptions, allowed_errors, job_parameters
from midlogit.jobs.part_files import read_metadata, read_part
from midlogit.jobs.plan import file_digests, write_plan
from midlogit.jobs.queues import SharedQueue, SinglePart, WorkerRole
from midlogit.jobs.run_folder import RunFolder
from midlogit.jobs.source import PairSource
from midlogit.jobs.status import Status, StatusReader
from midlogit.jobs.verify import problems
from midlogit.jobs.worker import Progress, Worker
from midlogit.pair import Pair

if TYPE_CHECKING:
    import pyarrow as pa


class Job:
    """A batch job in a folder.

    Attributes:
        path: the folder. manifest: what the job is.
    """

    def __init__(self, folder: RunFolder, manifest: Manifest) -> None:
        self.path = folder.path
        self.manifest = manifest
        self._folder = folder
        self._status = StatusReader(folder, manifest)

    @classmethod
    def open(cls, run: str | Path) -> Job:
        """Opens a job that was planned.

        Raises:
            InvalidRequest: there is none in the folder, or it is of a newer schema.
        """
        require("pyarrow", "batch")
        folder = RunFolder(Path(run))
        return cls(folder, folder.manifest())

    @classmethod
    def plan(
        cls,
        inputs: Sequence[str | Path],
        run: str | Path,
        source: PairSource,
        options: JobOptions | None = None,
    ) -> Job:
        """Plans a job, or opens the one in the folder if it has the same parameters.

        Args:
            inputs: files of prompts; none to go on with what was planned.
            source: where the pair comes from.

        Raises:
            InvalidRequest: an input, a parameter or a folder that cannot be used, or other parameters than those that
                the job began with.
            MidlogitError: models that cannot be mixed. StorageFailure: the folder cannot be written.
        """
        require("pyarrow", "batch")
        folder = RunFolder(Path(run))
        folder.require_usable()
        paths, options = [Path(path) for path in inputs], options or JobOptions()
        if options.params.seed is None:
            options = replace(options, params=replace(options.params, seed=0))

        if not paths and not folder.is_planned:
            raise InvalidRequest("There is no input.", "Name files of prompts.")
        digests = file_digests(paths)
        with source.mixing() as mixing:
            facts = source.facts(mixing)
            if folder.is_planned:
                manifest = folder.manifest()
                digests = digests or manifest.parameters["inputs"]
                manifest.require_same(job_parameters(digests, facts, options), folder.path)
            else:
                parameters = job_parameters(digests, facts, options)
                with storing(folder.path):
                    write_plan(folder.path, paths, parameters, options, mixing)
        with storing(folder.path):
            folder.make()
            write_card(folder)
        return cls.open(folder.path)

    def require_same_pair(self, source: PairSource) -> None:
        """Refuses other models or another engine than those that the job began with.

        Raises:
            InvalidRequest: names what differs. MidlogitError: models that cannot be mixed.
        """
        with source.mixing() as mixing:
            parameters = {**self.manifest.parameters, **source.facts(mixing)}
            self.manifest.require_same(parameters, self.path)

    def run(
        self,
        pair: Pair,
        *,
        role: WorkerRole | None = None,
        max_errors: str | int = "1%",
        on_progress: Callable[[Progress], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        retry: bool = False,
    ) -> bool:
        """Works on the job until it is complete.

        Args:
            role: which of several workers this is; each begins with its share, and goes on with what others left.
            max_errors: as of `JobOptions`; of all workers together, as far as finished parts tell.
            on_progress, should_stop: called about ten times a second.
            retry: make the completions again that ended as errors, in place of those that are missing.

        Returns:
            Whether it is complete; false after `should_stop`.

        Raises:
            EngineFailure: the engine died. TooManyErrors: more errors than allowed. StorageFailure: the folder cannot
                be written. Occupied: another process of this machine has the role. What was finished is kept.
        """
        role = role or WorkerRole()
        parts = self.parts_with_errors() if retry else self.missing()
        if not parts:
            return True

        with storing(self.path):
            presence = Presence(self._folder, str(role))

        def report(progress: Progress) -> None:
            presence.beat(progress.items, progress.tokens, progress.tokens_per_s, progress.errors)
            on_progress(progress)

        errors = 0 if retry else self._status.errors_of_done_parts()
        try:
            worker = Worker(
                self._folder,
                self.manifest,
                pair,
                SharedQueue(self._folder, presence, role, parts, retry=retry),
                allowed_errors=allowed_errors(max_errors, self.manifest.items) - errors,
                on_progress=report,
                should_stop=should_stop,
                retry=retry,
            )
            return worker.run()
        finally:
            presence.close()

    def work(self, pair: Pair, part: int) -> dict[str, Any]:
        """Works on one part, which a launcher such as Ray assigned; several threads may work parts on one pair.

        Returns:
            The metadata of its results, its summary among them.

        Raises:
            EngineFailure, StorageFailure: as `run`.
        """
        path = self._folder.results_file(part)
        if path.exists():
            return read_metadata(path)
        queue = SinglePart(part)
        Worker(self._folder, self.manifest, pair, queue, allowed_errors=self.manifest.items).run()
        assert queue.footer is not None
        return queue.footer

    def missing(self) -> list[int]:
        """The numbers of the parts that are not done."""
        return sorted(set(range(self.manifest.parts)) - self._folder.done())

    def parts_with_errors(self) -> list[int]:
        """The numbers of the parts that are done and hold errors."""
        return [
            part
            for part in sorted(self._folder.done())
            if read_metadata(self._folder.results_file(part))["summary"]["errors"]
        ]

    def status(self) -> Status:
        """What is done, from files alone."""
        return self._status.read()

    def verify(self) -> list[str]:
        """What is wrong with the results; empty if every item is there exactly once and every file is sound."""
        return list(problems(self._folder, self.manifest))

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The results, one table per part that is done, in the order of the input."""
        for part in sorted(self._folder.done()):
            yield read_part(self._folder.results_file(part), columns)


def write_card(folder: RunFolder) -> None:
    """Writes the card by which `datasets` and the Hub know the folder as a data set; keeps one that is there."""
    path = folder.path / "README.md"
    if path.exists():
        return
    manifest = folder.manifest()
    parameters = manifest.parameters
    text = (
        "---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n"
        "tags:\n- midlogit\n- synthetic\n---\n\n"
        f"# {folder.path.resolve().name}\n\n"
        f"{manifest.items} completions of {manifest.rows} prompts, drawn by midlogit {manifest.version} from q*, "
        f"the mixture of two language models with both KL divergences equal at each token.\n\n"
        f"- sampling: `{parameters['sampling']}`\n- engine: {parameters['engine']}\n"
        f"- fingerprint of all parameters: `{manifest.fingerprint}` (`plan/manifest.json`)\n"
    )
    write_whole(path, text.encode())

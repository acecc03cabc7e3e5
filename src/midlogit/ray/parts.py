"""Runs the parts of a job on an autoscaling pool of Ray actors; the driver's side, which opens no pair.

What travels through Ray is the number of a part, and the summary of its results once it is committed. Progress lives in
the job's folder alone, so that a dead actor, node or driver costs only the sequences that ran.
"""

from __future__ import annotations

import logging
import pickle
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import orjson

from midlogit.errors import EngineFailure, InvalidRequest, first_line
from midlogit.jobs import Job, PairSource
from midlogit.jobs.claims import Presence
from midlogit.jobs.errors import TooManyErrors
from midlogit.jobs.options import allowed_errors
from midlogit.jobs.part_files import read_metadata
from midlogit.jobs.run_folder import RunFolder
from midlogit.jobs.worker import Progress, Rate
from midlogit.ray.cluster import connected, require_nodes
from midlogit.ray.part_worker import PartWorker
from midlogit.ray.pool import actor_pool

TICK_S = 0.1
PATIENCE_S = 30.0  # for the pool to end
ROLE = "ray"
MOST_ATTEMPTS = (
    20  # of a part: three with all its items, then one for each item that breaks an engine alone
)


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many actors work on a job, and what each takes.

    Attributes:
        least, most: actors; the pool grows while parts wait.
        gpus: of each; None for one per device of the models, where the cluster has GPUs.
    """

    least: int = 1
    most: int = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise InvalidRequest(f"The replicas are {self.least}:{self.most}.", "Give 1 ≤ LO ≤ HI.")
        if self.gpus is not None and self.gpus < 0:
            raise InvalidRequest(f"A replica has {self.gpus:g} GPUs.", "Give 0 or more.")

    @classmethod
    def parse(cls, text: str, gpus: float | None) -> Replicas:
        """The replicas that a text such as "1:8" or "4" names.

        Raises:
            InvalidRequest: no such text, or numbers out of range.
        """
        least, colon, most = text.partition(":")
        if not (least.isdecimal() and (most.isdecimal() or not colon)):
            raise InvalidRequest(f"The replicas are {text!r}.", "Write them as LO:HI, such as 1:8.")
        return cls(int(least), int(most if colon else least), gpus)


def run_on_ray(
    job: Job,
    source: PairSource,
    replicas: Replicas,
    *,
    address: str = "local",
    max_errors: str | int = "1%",
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Works on a job until it is complete, on actors that each open a pair.

    Args:
        source: of each actor's pair.
        address: as of `midlogit.ray.cluster.connected`.
        max_errors, on_progress, should_stop: as of `Job.run`; items and tokens are counted as parts are committed.

    Returns:
        Whether it is complete; false after `should_stop`.

    Raises:
        MidlogitError: as `Job.run`, and what `connected` and `require_nodes` refuse.
    """
    missing = job.missing()
    if not missing:
        return True

    folder = RunFolder(job.path.resolve())
    source, folders = _with_absolute_folders(source)
    tally = _Tally(job, folder, allowed_errors(max_errors, job.manifest.items))
    presence = Presence(folder, ROLE)
    try:
        with connected(address):
            gpus = _gpus_of(source) if replicas.gpus is None else replicas.gpus
            require_nodes(gpus, [folder.path, *folders], address=address)
            pool = replace(replicas, gpus=gpus)
            with _Footers(_parts(missing, folder.path, source, pool)) as footers:
                while not should_stop():
                    footer = footers.next(TICK_S)
                    if footers.is_over:
                        return True
                    if footer is not None:
                        tally.add(footer)
                    progress = tally.progress
                    presence.beat(
                        progress.items, progress.tokens, progress.tokens_per_s, progress.errors
                    )
                    on_progress(progress)
            return False
    finally:
        presence.close()


class _Footers:
    """The footers of parts as they are committed, from a thread that follows the pool."""

    def __init__(self, dataset: Any) -> None:
        self.is_over = False
        self._dataset = dataset
        self._found: queue.SimpleQueue[dict[str, Any] | Exception | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name="midlogit-ray", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the pool: Ray ends the whole process if a thread uses a connection that was closed."""
        deadline = time.monotonic() + PATIENCE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            if (executor := self._dataset._current_executor) is not None:
                executor.shutdown(force=True)
            self._thread.join(TICK_S)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next footer; None if none comes in time, or if all have come.

        Raises:
            MidlogitError: an actor's error, or Ray's.
        """
        try:
            found = self._found.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(found, Exception):
            raise found
        self.is_over = found is None
        return found

    def _follow(self) -> None:
        try:
            for row in self._dataset.iter_rows():
                failure = row["failure"]
                self._found.put(pickle.loads(failure) if failure else orjson.loads(row["footer"]))
            self._found.put(None)
        except Exception as error:  # the boundary to Ray: whatever it raises ends the job
            self._found.put(
                EngineFailure(
                    f"Ray gave up: {first_line(error)}.",
                    "What was finished is kept: run the same command again.",
                )
            )


class _Tally:
    """Counts what was committed.

    Args:
        allowed_errors: completions that may end as errors, those of parts that were done before counted too.
    """

    def __init__(self, job: Job, folder: RunFolder, allowed_errors: int) -> None:
        done = [read_metadata(folder.results_file(part))["summary"] for part in folder.done()]
        self.progress = Progress()
        self._rate = Rate()
        self._allowed = allowed_errors - sum(summary["errors"] for summary in done)
        self._committed = sum(summary["completions"] for summary in done)
        self._before = job.status().done  # those in journals of open parts counted too

    def add(self, footer: dict[str, Any]) -> None:
        """Takes the footer of a part.

        Raises:
            TooManyErrors: more than allowed.
        """
        progress, summary = self.progress, footer["summary"]
        self._committed += summary["completions"]
        progress.parts += 1
        progress.items = max(self._committed - self._before, 0)
        progress.tokens += summary["completion_tokens"]
        progress.errors += summary["errors"]
        progress.tokens_per_s = self._rate.per_second(progress.tokens)
        if progress.errors > self._allowed:
            raise TooManyErrors(
                f"{progress.errors} completions ended as errors. What was finished is kept.",
                "`midlogit batch status` shows some; allow more by --max-errors.",
            )


def _with_absolute_folders(source: PairSource) -> tuple[PairSource, list[Path]]:
    """The source with the folders of its models as absolute paths, which mean the same on every node; the folders."""
    folders = []

    def absolute(model: Any) -> Any:
        if not isinstance(model, str | Path) or not Path(model).expanduser().is_dir():
            return model
        folders.append(Path(model).expanduser().resolve())
        return folders[-1]

    source = replace(source, base=absolute(source.base), teacher=absolute(source.teacher))
    return source, folders


def _gpus_of(source: PairSource) -> int:
    """The GPUs that a pair takes in a cluster that has any: one per device."""
    import ray

    device = source.options.get("device", "auto")
    if source.engine == "http" or device == "cpu" or not ray.cluster_resources().get("GPU"):
        return 0
    return len(set(device)) if isinstance(device, tuple) else 1


def _parts(missing: Sequence[int], run: Path, source: PairSource, pool: Replicas) -> Any:
    """The dataset of the job's missing parts, each mapped to its footer by the pool."""
    import ray

    data = ray.data.DataContext.get_current()
    data.enable_progress_bars = False
    data.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    processors = ray.cluster_resources().get("CPU", 0)
    return ray.data.from_items(
        [{"part": part} for part in missing], override_num_blocks=len(missing)
    ).map_batches(
        PartWorker,
        fn_constructor_kwargs={"run": run, "source": source},
        batch_size=1,
        batch_format="pyarrow",
        num_gpus=pool.gpus,
        # A pool that holds every processor could wait for a task of Ray's own forever (ray-project/ray#44687).
        num_cpus=int(processors > pool.most),
        **actor_pool(pool.least, pool.most),
    )

"""Runs the parts of a job on an autoscaling pool of Ray actors; the driver's side, which opens no pair.

Only the numbers of parts travel through Ray. Progress lives in the folder of the job, so that a dead actor, node or
driver costs only the sequences that ran.
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

from midlogit.errors import EngineFailure, InvalidRequest, first_line
from midlogit.jobs import Job, PairSource
from midlogit.jobs.claims import Presence
from midlogit.jobs.errors import TooManyErrors
from midlogit.jobs.options import allowed_errors
from midlogit.jobs.run_folder import RunFolder
from midlogit.jobs.worker import Progress, Rate
from midlogit.ray.cluster import connected, require_nodes
from midlogit.ray.part_worker import PartWorker
from midlogit.ray.pool import actor_pool

TICK_S = 0.1
LOOK_S = 10.0  # between looks at the job's folder
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
        max_errors, on_progress, should_stop: as of `Job.run`.

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
    watch = _Watch(job, allowed_errors(max_errors, job.manifest.items))
    presence = Presence(folder, ROLE)
    try:
        with connected(address):
            gpus = _gpus_of(source) if replicas.gpus is None else replicas.gpus
            require_nodes(gpus, [folder.path, *folders], address=address)
            dataset = _parts(missing, folder.path, source, replace(replicas, gpus=gpus))
            with _Pool(dataset) as pool:
                is_done = False
                while not (is_done or should_stop()):
                    is_done = pool.is_done(TICK_S)
                    progress = watch.look(at_once=is_done)
                    presence.beat(
                        progress.items, progress.tokens, progress.tokens_per_s, progress.errors
                    )
                    on_progress(progress)
                return is_done
    finally:
        presence.close()


class _Pool:
    """A pool that works on a dataset of parts while the block runs, followed by a thread of its own."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
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

    def is_done(self, seconds: float) -> bool:
        """Whether all parts are done; waits so long for it.

        Raises:
            MidlogitError: an actor's error, or Ray's.
        """
        try:
            failure = self._ended.get(timeout=seconds)
        except queue.Empty:
            return False
        if failure is not None:
            raise failure
        return True

    def _follow(self) -> None:
        try:
            for row in self._dataset.iter_rows():
                if row["failure"]:
                    self._ended.put(pickle.loads(row["failure"]))
                    return
            self._ended.put(None)
        except Exception as error:  # the boundary to Ray: whatever it raises ends the job
            self._ended.put(
                EngineFailure(
                    f"Ray gave up: {first_line(error)}.",
                    "What was finished is kept: run the same command again.",
                )
            )


class _Watch:
    """Looks at what is done of a job, now and then, in its folder; the longer a look takes, the less often.

    Args:
        allowed_errors: completions that may end as errors.
    """

    def __init__(self, job: Job, allowed_errors: int) -> None:
        self._progress = Progress()
        self._job = job
        self._first = job.status()
        self._allowed = allowed_errors
        self._rate = Rate()
        self._next = time.monotonic() + LOOK_S

    def look(self, *, at_once: bool) -> Progress:
        """Looks, if it is time or `at_once`; the progress since the watch began.

        Raises:
            TooManyErrors: more than allowed.
        """
        begin = time.monotonic()
        if begin < self._next and not at_once:
            return self._progress

        status, first, progress = self._job.status(), self._first, self._progress
        progress.parts = status.parts_done - first.parts_done
        progress.items = max(status.done - first.done, progress.items)
        progress.tokens = max(status.tokens - first.tokens, progress.tokens)
        progress.errors = status.errors - first.errors
        progress.tokens_per_s = self._rate.per_second(progress.tokens)
        if progress.errors and status.errors > self._allowed:
            raise TooManyErrors(
                f"{status.errors} completions ended as errors. What was finished is kept.",
                "`midlogit batch status` shows some; allow more by --max-errors.",
            )
        self._next = time.monotonic() + max(LOOK_S, 20 * (time.monotonic() - begin))
        return progress


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
    """The dataset of the job's missing parts, each mapped by the pool to the error that ends the job, or to none."""
    import ray

    data = ray.data.DataContext.get_current()
    data.enable_progress_bars = False
    data.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for module in ("progress", "issue_detection"):  # advice about its own options
        logging.getLogger(f"ray.data._internal.{module}").setLevel(logging.ERROR)
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

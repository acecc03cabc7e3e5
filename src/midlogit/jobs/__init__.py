"""Batch jobs: prompts of any number to results that survive anything, part by part; the API of `midlogit batch`.

    source = PairSource("local")
    options = JobOptions(SamplingParams.preset("balanced", n=4, seed=0))
    job = Job.plan(["prompts.parquet"], "RUN", source, options)
    with source.open() as pair:
        job.run(pair)

The same lines begin a job and go on with it after a crash.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from midlogit.jobs.errors import Occupied, StorageFailure, TooManyErrors
    from midlogit.jobs.exports import export
    from midlogit.jobs.inputs import Columns
    from midlogit.jobs.job import Job
    from midlogit.jobs.options import JobOptions
    from midlogit.jobs.queues import WorkerRole
    from midlogit.jobs.source import PairSource
    from midlogit.jobs.status import Status

_HOMES = {
    "Columns": "midlogit.jobs.inputs",
    "Job": "midlogit.jobs.job",
    "JobOptions": "midlogit.jobs.options",
    "Occupied": "midlogit.jobs.errors",
    "PairSource": "midlogit.jobs.source",
    "Status": "midlogit.jobs.status",
    "StorageFailure": "midlogit.jobs.errors",
    "TooManyErrors": "midlogit.jobs.errors",
    "WorkerRole": "midlogit.jobs.queues",
    "export": "midlogit.jobs.exports",
}

__all__ = [
    "Columns",
    "Job",
    "JobOptions",
    "Occupied",
    "PairSource",
    "Status",
    "StorageFailure",
    "TooManyErrors",
    "WorkerRole",
    "export",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'midlogit.jobs' has no attribute {name!r}")

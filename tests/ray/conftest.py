"""A real Ray on the loopback address; these tests run in an environment that has Ray (see Makefile)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

# Read when Ray is imported: without clusters of several machines it binds nothing but 127.0.0.1.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"

if find_spec("ray") is None:
    collect_ignore = ["test_cluster.py", "test_example.py", "test_generate.py", "test_parts.py"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two CPUs for the tests of a module."""
    import ray

    ray.init(
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "ray":
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # Ray's own, many of them

"""The connection to Ray and a look at its nodes before any model is loaded; knows no job and no engine."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from midlogit import __version__
from midlogit.errors import (
    InvalidRequest,
    MidlogitError,
    MissingExtra,
    ModelUnavailable,
    ServerUnavailable,
    UnsupportedVersion,
    first_line,
)
from midlogit.extras import require

LOCAL = "local"
OBJECT_STORE_BYTES = 100 * 2**20  # of a Ray of our own: only numbers of parts travel through it
CONNECT_S = 10.0
PROBE_S = 120.0
HINT = "Start one, or use --ray local."


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connects to a Ray cluster while the block runs.

    Args:
        address: "local" for a Ray of our own on this machine, "auto" for the cluster that this machine is part of, or
            the address of a cluster.

    Raises:
        MissingExtra: Ray is not installed. ServerUnavailable: no cluster at the address.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0"}
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address == LOCAL:
        # Read when Ray is imported, on every system: a cluster of one machine listens on 127.0.0.1 alone.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}

    ray = require("ray", "ray")
    _require_listener(address)
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, **options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = first_line(error).rstrip(".")
        raise ServerUnavailable(f"No Ray cluster at {address}: {reason}.", HINT) from error
    if is_main:
        signal.signal(signal.SIGTERM, handler)  # which Ray took for itself

    try:
        yield
    finally:
        # Threads of Ray that still run would complain of the lost connection, and by default connect again.
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Refuses an address at which nobody listens, which Ray would try for minutes.

    Raises:
        ServerUnavailable: as `connected`.
    """
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), CONNECT_S).close()
    except OSError as error:
        raise ServerUnavailable(f"No Ray cluster at {address}: {error}.", HINT) from error


def require_nodes(gpus: float, folders: Sequence[Path], *, address: str) -> None:
    """Refuses a cluster in which a replica could not start: on each node that may get one, a task looks around.

    Args:
        gpus: of a replica; nodes with fewer get none.
        folders: that each node must see under the same path.

    Raises:
        MissingExtra: a node without midlogit. UnsupportedVersion: with another version of it.
        ModelUnavailable: without one of the folders. InvalidRequest: no node has the GPUs.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [
        node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus
    ]
    if not nodes and address == LOCAL:
        raise InvalidRequest(
            f"This machine has not the {gpus:g} GPUs of a replica.", "Lower --gpus-per-replica."
        )

    wanted = [str(folder) for folder in folders]
    tasks = [
        ray.remote(num_cpus=0, max_retries=0)(_probe())
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(wanted)
        for node in nodes
    ]
    for node, task in zip(nodes, tasks, strict=True):
        name = node["NodeManagerAddress"]
        try:
            version, missing = ray.get(task, timeout=PROBE_S)
        except ray.exceptions.RayError as error:
            raise ServerUnavailable(
                f"Node {name} of the cluster runs no task: {first_line(error)}"
            ) from error
        if (problem := _problem(name, version, missing)) is not None:
            raise problem


def _probe() -> Any:
    """A function that tells the version of midlogit of a node and which paths are not there.

    It is a nested one, so that Ray sends its code: a node without midlogit could not import it.
    """

    def look(paths: list[str]) -> tuple[str | None, list[str]]:
        from pathlib import Path

        try:
            from midlogit import __version__ as version
        except ImportError:
            return None, []
        return version, [path for path in paths if not Path(path).exists()]

    return look


def _problem(name: str, version: str | None, missing: list[str]) -> MidlogitError | None:
    """Why a node can have no replica; None where it can."""
    if version is None:
        return MissingExtra(
            f"Node {name} of the cluster has no midlogit.",
            f"Run there: pip install 'midlogit[ray]=={__version__}', with the extra of the engine.",
        )
    if version != __version__:
        return UnsupportedVersion(
            f"Node {name} of the cluster has midlogit {version}, and this one is {__version__}.",
            "Install the same version.",
        )
    if missing:
        return ModelUnavailable(
            f"Node {name} of the cluster does not see {', '.join(missing)}.",
            "Put it on a file system that all nodes share, under the same path.",
        )
    return None

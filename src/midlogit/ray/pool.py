"""Pools of Ray Data's actors in which several calls feed one engine; knows how each version of Ray asks for them."""

from __future__ import annotations

import inspect
from typing import Any

from midlogit.extras import require

CALLS_PER_ACTOR = (
    2  # while the longest completions of one call end, the next call fills the free slots
)


def actor_pool(least: int = 1, most: int | None = None) -> dict[str, Any]:
    """Arguments of `map_batches` for a pool of actors, each with two calls at once on its engine.

    Args:
        least, most: actors, each with a pair of its own; `most` is `least` when left out.

    Returns:
        `compute`, and what else the installed Ray needs.

    Raises:
        MissingExtra: Ray is not installed.
    """
    strategy = require("ray.data", "ray").ActorPoolStrategy
    in_strategy = "max_concurrent_calls_per_actor" in inspect.signature(strategy).parameters
    name = "max_concurrent_calls_per_actor" if in_strategy else "max_concurrency"  # before Ray 2.59
    calls = {name: CALLS_PER_ACTOR}

    compute = strategy(
        min_size=least,
        max_size=least if most is None else most,
        max_tasks_in_flight_per_actor=2 * CALLS_PER_ACTOR,  # a pool with fewer would never grow
        enable_true_multi_threading=True,
        **(calls if in_strategy else {}),
    )
    return {"compute": compute, **({} if in_strategy else calls)}

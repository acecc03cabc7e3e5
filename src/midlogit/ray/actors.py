"""Life and death of an actor that holds an engine; knows how Ray repeats calls, nothing of what they do."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from midlogit.errors import EngineFailure


def end_actor(failure: Exception, *, most_attempts: int) -> NoReturn:
    """Ends this process, so that Ray starts the actor and its calls again, unless this call was tried often enough.

    A broken engine stays broken. Ray repeats the calls of an actor whose process died, but not those that raise, nor
    those of an actor that ends by `ray.actor.exit_actor` (ray-project/ray#60145).

    Args:
        most_attempts: of a call, those that ended because a node was lost counted too.

    Raises:
        EngineFailure: this was the last attempt.
    """
    from ray._private.worker import global_worker

    attempt = global_worker.core_worker.get_current_task_attempt_number() + 1
    if attempt >= most_attempts:
        raise EngineFailure(f"Attempt {attempt} of {most_attempts} failed: {failure}") from failure
    print(f"Attempt {attempt} of {most_attempts} failed: {failure}", file=sys.stderr, flush=True)
    os._exit(1)

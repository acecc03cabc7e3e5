"""The part of the public API that a trainer needs: new weights for the base while requests run, and pauses.

Knows signatures; each engine's folder knows how weights are replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from midlogit.engines.base import Engine, Pausing, Running, Updating, Weights
from midlogit.errors import InvalidRequest

if TYPE_CHECKING:
    from torch.nn import Module


class Updates:
    """The part of `midlogit.Pair` that replaces the base's weights."""

    engine: Engine
    _abort_unsubmitted: Callable[[], None]

    @property
    def base_version(self) -> int | str | None:
        """The version of the base's weights; None while they were never replaced."""
        return self._updating.base_version

    def shares_base(self, module: Module) -> bool:
        """Whether the base's weights are those of a module, or of what it wraps: such a base changes with it."""
        return self._updating.shares_base(module)

    def update_base(
        self,
        weights: Weights | None = None,
        *,
        version: int | str | None = None,
        running: Running = "recompute",
    ) -> None:
        """Replaces the base's weights between two tokens; blocks until that is done.

        Everything is checked before anything is written: after an error the old weights are in place, and requests
        run on. The teacher, its caches among them, is not touched.

        Args:
            weights: (name, tensor) pairs, or a folder of safetensors files, with all names of the model and no others;
                a tied head may be left out. None says that the module which the pair was opened over has changed by
                itself.
            version: which the tokens drawn from now on carry (`Completion.weight_versions`); by default updates are
                numbered from 1.
            running: what becomes of requests that have begun: "recompute" computes their tokens so far again under
                the new weights, so that later tokens are drawn as by a new pair; "keep" goes on with what the old
                weights have cached; "abort" ends them, with finish_reason "abort" and what they had.

        Raises:
            WeightMismatch: a torn file, a missing or unknown name, another shape, NaN or infinite values.
            InvalidRequest: what this engine cannot do.
            EngineFailure: the engine is closed or has failed.
        """
        self._updating.update_base(weights, version=version, running=running)

    def pause(self, running: Pausing = "keep") -> None:
        """Stops drawing tokens until `resume`; blocks until that is so. Requests that come meanwhile wait.

        Args:
            running: "keep" leaves requests where they are, "abort" ends them, with finish_reason "abort", "wait" lets
                them run to their end first.

        Raises:
            EngineFailure: the engine is closed or has failed.
        """
        if running == "abort":
            self._abort_unsubmitted()
        self._updating.pause(running)

    def resume(self) -> None:
        """Goes on after `pause`; without one, does nothing.

        Raises:
            EngineFailure: the engine is closed or has failed.
        """
        self._updating.resume()

    @property
    def _updating(self) -> Updating:
        if not isinstance(self.engine, Updating):
            raise InvalidRequest("This engine's weights cannot be replaced.")
        return self.engine

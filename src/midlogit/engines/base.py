"""The seam that every engine fills: submit sequences, abort them, close; what only some can do; knows no model.

Engines run in the background. A sequence's listener is called from the engine's thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from midlogit.engines.draft_length import DraftLength
from midlogit.errors import InvalidRequest
from midlogit.requests.scoring import Scored
from midlogit.requests.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Weights = Iterable[tuple[str, "Tensor"]] | Path  # by name, or a folder of safetensors files
Running = Literal["recompute", "keep", "abort"]  # what becomes of requests when weights change
Pausing = Literal["keep", "abort", "wait"]  # what becomes of requests when the engine pauses


class Engine(ABC):
    """Runs sequences to their end.

    Attributes:
        draft_length: chooses the number of drafts per round, and counts accepted drafts.
        max_num_seqs: most sequences that run at once; more wait, in their order.
        failure: what the engine died of, set before the sequences that it held end; None while it lives.
    """

    failure: str | None = None

    def __init__(self, draft_length: DraftLength, max_num_seqs: int) -> None:
        self.draft_length = draft_length
        self.max_num_seqs = max_num_seqs

    @abstractmethod
    def submit(self, sequence: Sequence) -> None:
        """Takes a sequence; it begins when there is room for it.

        Raises:
            EngineFailure: the engine is closed or has failed.
        """

    @abstractmethod
    def abort(self, sequences: list[Sequence]) -> None:
        """Ends those of the sequences that still run, with finish_reason "abort"."""

    @abstractmethod
    def close(self) -> None:
        """Aborts what runs and frees the models; may be called twice."""


class Scoring(ABC):
    """The capability of an engine to score given text."""

    @abstractmethod
    def score(self, texts: list[Scored]) -> None:
        """Takes texts to score; each listener hears its scores.

        Raises:
            EngineFailure: the engine is closed or has failed.
        """

    @abstractmethod
    def forget(self, texts: list[Scored]) -> None:
        """Drops those of the texts that still wait to be scored; their listeners hear nothing."""


class Updating(ABC):
    """The capability of an engine to have its base trained: new weights while requests run, and pauses.

    All calls block until they are done, and may come from any thread but the engine's own.

    Attributes:
        base_version: of the base's weights; None while no version was ever set.
        num_updates: how often the weights were replaced.
    """

    base_version: int | str | None = None
    num_updates: int = 0

    def shares_base(self, module: Module) -> bool:
        """Whether the base's weights are those of a module; an engine of its own weights shares none."""
        return False

    @abstractmethod
    def update_base(
        self, weights: Weights | None, *, version: int | str | None, running: Running
    ) -> None:
        """See `midlogit.Pair.update_base`."""

    def base_checksum(self) -> int:
        """The sum of the bits of the base's weights, of which names, order and fused layers change nothing.

        Raises:
            InvalidRequest: the weights are not in this process.
        """
        raise InvalidRequest("The base's weights are not in this process.")

    @abstractmethod
    def pause(self, running: Pausing) -> None:
        """See `midlogit.Pair.pause`."""

    @abstractmethod
    def resume(self) -> None:
        """See `midlogit.Pair.resume`."""

    def _count_update(self, version: int | str | None) -> None:
        """Notes that the weights were replaced; without a version, they are numbered from 1."""
        self.num_updates += 1
        self.base_version = self.num_updates if version is None else version


class WeightTransfer(ABC):
    """The capability of an engine to receive the base's weights from a trainer's process, as vLLM itself does.

    The four methods are vLLM's, in the order of the calls, with its own bodies of init_info and update_info. From
    `start_weight_update` on no token is drawn, until `finish_weight_update` or `Updating.update_base` has replaced the
    weights. All block until they are done, and may come from any thread but the engine's own.
    """

    @property
    @abstractmethod
    def transfer_backend(self) -> str | None:
        """vLLM's backend, such as "nccl"; None where the base was opened without `weight_transfer_config`."""

    @property
    def transfer_world_size(self) -> int:
        """How many processes of the base take part in a transfer."""
        return 1

    @abstractmethod
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects to the trainer.

        Raises:
            InvalidRequest: no backend, or what vLLM refuses.
        """

    @abstractmethod
    def start_weight_update(self) -> None:
        """Begins an update.

        Raises:
            InvalidRequest: no backend, or an update has begun already.
        """

    @abstractmethod
    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receives some of the tensors.

        Raises:
            WeightMismatch: an unknown name or another shape; nothing was received.
            InvalidRequest: no update has begun, or what vLLM refuses.
        """

    @abstractmethod
    def finish_weight_update(
        self, *, version: int | str | None = None, running: Running = "recompute"
    ) -> None:
        """Ends an update, and lets requests run on.

        Raises:
            WeightMismatch: tensors are missing, or NaN or infinite; requests wait until an update is complete.
            InvalidRequest: no update has begun.
        """

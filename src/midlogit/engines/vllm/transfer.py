"""New weights for the base's core alone: checks them, then has vLLM load or receive them. Knows no sequence.

vLLM writes into the tensors that the model has, so CUDA graphs stay valid. Named tensors and folders are checked in
full before. Tensors that come from a trainer's process, by NCCL say, are checked by name and shape before they are
received, and by value only once they are written: after NaN, and after an update that ends early, nothing runs until
another update is complete.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from midlogit.engines.base import Running, Weights, WeightTransfer
from midlogit.engines.draft_length import DraftLength
from midlogit.engines.layout import Layout
from midlogit.engines.stepping import SteppingEngine
from midlogit.engines.vllm.adapters import PLAIN
from midlogit.engines.vllm.core import Core
from midlogit.engines.vllm.lockstep import Lockstep
from midlogit.engines.vllm.ranks import OnLockstep
from midlogit.engines.vllm.shared import SharedTensors
from midlogit.engines.weights import (
    NamedTensors,
    SafetensorsFolder,
    are_finite,
    check_weights,
    checksum,
)
from midlogit.errors import EngineFailure, InvalidRequest, WeightMismatch, first_line
from midlogit.models.checkpoint import Checkpoint
from midlogit.models.weights import architecture, stored_tensors
from midlogit.requests.scoring import Scored
from midlogit.requests.sequence import Sequence

WAITS = "Requests wait until an update is complete: send the weights again, or call update_base."


def layout_of(checkpoint: Checkpoint) -> Layout:
    """The tensors of a checkpoint: of its safetensors files, or where they are not here, of its architecture."""
    shapes = {name: tensor.shape for name, tensor in stored_tensors(Path(checkpoint.name)).items()}
    if not shapes:
        return Layout.of(architecture(checkpoint))
    if not checkpoint.config.tie_word_embeddings:
        return Layout(shapes, frozenset())
    embedding = next((shapes[name] for name in shapes if name.endswith("embed_tokens.weight")), ())
    return Layout({"lm_head.weight": embedding, **shapes}, frozenset({"lm_head.weight"}))


class TransferEngine(SteppingEngine[Sequence | Scored], WeightTransfer):
    """The part of the vLLM engine that replaces the base's weights.

    Args:
        base: the core that gets them. checkpoint: of the base.
    """

    def __init__(
        self, base: Core, checkpoint: Checkpoint, draft_length: DraftLength, max_num_seqs: int
    ) -> None:
        super().__init__(draft_length, max_num_seqs)
        self._base = base
        self._layout = layout_of(checkpoint)
        self._received: set[str] | None = None  # names that came since an update has begun

    @abstractmethod
    def on_every_rank(self, call: OnLockstep, *arguments: Any) -> list[Any]:
        """Makes a call with the lockstep of every rank, between two steps, in the engine's thread.

        Args:
            call: a function of a module, so that the other ranks can load it. arguments: sent to them.

        Returns:
            What each rank returned, this one's first.

        Raises:
            Exception: what one of the ranks raised.
        """

    def check_weights(self, weights: Weights | None) -> NamedTensors:
        if self._base.has_adapter:
            raise InvalidRequest("A base with an adapter cannot be given weights.", PLAIN)
        if weights is None:
            raise InvalidRequest(
                "No weights are given, and vLLM's copy of the base does not change by itself.",
                "Give named tensors or a folder.",
            )
        return check_weights(weights, self._layout)

    def load_weights(self, checked: NamedTensors) -> None:
        is_sent = self.transfer_world_size > 1 and not isinstance(checked, SafetensorsFolder)
        named = SharedTensors([*checked]) if is_sent else checked
        self._vllm("reload_weights", reload_weights, named)
        if self._base.is_receiving:  # an update that its trainer never finished
            self._call_vllm("finish_weight_update")
        self.on_every_rank(repack_head)
        self._received = None

    def base_checksum(self) -> int:
        if self.transfer_world_size > 1:
            raise InvalidRequest(
                f"The base's weights are shared by {self.transfer_world_size} devices.",
                "Ask for their checksum where one device has all of them.",
            )
        return self.between_steps(lambda: checksum(self._base.weights()))

    def recompute(self) -> None:
        self.on_every_rank(preempt_all)

    def forget_prefixes(self) -> None:
        self.on_every_rank(forget_prefixes)

    @property
    def transfer_backend(self) -> str | None:
        return self._base.transfer_backend

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._require_backend()
        self.between_steps(
            partial(self._call_vllm, "init_weight_transfer_engine", init_info=init_info)
        )

    def start_weight_update(self) -> None:
        self._require_backend()
        self.between_steps(self._start)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._require_backend()
        self.between_steps(partial(self._receive_tensors, update_info))

    def finish_weight_update(
        self, *, version: int | str | None = None, running: Running = "recompute"
    ) -> None:
        self._require_backend()
        self.between_steps(partial(self._finish, version, running))

    def _require_backend(self) -> None:
        if self.transfer_backend is None:
            raise InvalidRequest(
                "The engine was opened without weight transfer.",
                "Open it with Pair.vllm(..., weight_transfer_config={'backend': 'nccl'}).",
            )

    def _start(self) -> None:
        """Begins an update, and in the place of one that was never finished another."""
        self.settle()
        self._forget_finished()
        if self._base.is_receiving:
            self._call_vllm("finish_weight_update")
        self._call_vllm("start_weight_update")
        self._is_half_loaded = True
        self._received = set()

    def _receive_tensors(self, update_info: dict[str, Any]) -> None:
        received = self._names_so_far()
        names, shapes = update_info.get("names", ()), update_info.get("shapes", ())
        try:
            for name, shape in zip(names, shapes, strict=False):  # vLLM checks that they match
                self._layout.require_known(name, tuple(shape))
        except WeightMismatch as error:
            self._refuse(error)
        self._call_vllm("update_weights", update_info=update_info)
        received.update(names)

    def _finish(self, version: int | str | None, running: Running) -> None:
        try:
            self._layout.require_complete(self._names_so_far())
        except WeightMismatch as error:
            self._refuse(error)
        self._call_vllm("finish_weight_update")
        self.on_every_rank(repack_head)
        self._received = None
        if not all(self.on_every_rank(has_finite_weights)):
            raise WeightMismatch("The weights that came hold NaN or infinite values.", WAITS)
        self._begin_version(version, running)

    def _names_so_far(self) -> set[str]:
        if self._received is None:
            raise InvalidRequest("No update has begun.", "Call start_weight_update first.")
        return self._received

    def _refuse(self, error: WeightMismatch) -> NoReturn:
        """Ends an update of which nothing has come, so that the old weights stay; of another, waits for the rest.

        Raises:
            WeightMismatch: always.
        """
        if self._received:
            raise WeightMismatch(error.args[0], WAITS) from error
        self._call_vllm("finish_weight_update")  # vLLM puts back what no tensor came for
        self._received, self._is_half_loaded = None, False
        raise error

    def _call_vllm(self, method: str, **arguments: Any) -> None:
        """Calls a method of the base's worker on every rank.

        Raises:
            InvalidRequest: what vLLM refuses.
        """
        self._vllm(method, call_worker, method, arguments)

    def _vllm(self, method: str, call: OnLockstep, *arguments: Any) -> None:
        """Makes a call on every rank that ends in a method of vLLM.

        Raises:
            EngineFailure: a rank has ended. InvalidRequest: what vLLM refuses.
        """
        try:
            self.on_every_rank(call, *arguments)
        except EngineFailure:
            raise
        except Exception as error:  # vLLM, NCCL and CUDA raise many kinds
            if method == "update_weights":
                self._received = None
            hint = WAITS if self._is_half_loaded else ""
            raise InvalidRequest(f"vLLM's {method} failed: {first_line(error)}", hint) from error


def call_worker(lockstep: Lockstep, method: str, arguments: dict[str, Any]) -> None:
    lockstep.base.call_worker(method, **arguments)


def reload_weights(lockstep: Lockstep, named: NamedTensors) -> None:
    lockstep.base.call_worker("reload_weights", weights_iterator=iter(named))


def repack_head(lockstep: Lockstep) -> None:
    lockstep.base.repack_head()


def preempt_all(lockstep: Lockstep) -> None:
    lockstep.base.preempt_all()


def forget_prefixes(lockstep: Lockstep) -> None:
    lockstep.base.forget_prefixes()
    lockstep.scorer.begin_again()


def has_finite_weights(lockstep: Lockstep) -> bool:
    return are_finite(lockstep.base.weights())

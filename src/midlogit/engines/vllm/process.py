"""The two engine cores of one process; knows the order in which they open and close."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from midlogit.engines.vllm.adapters import Adapter
from midlogit.engines.vllm.core import Core
from midlogit.engines.vllm.memory import Split
from midlogit.errors import InvalidRequest
from midlogit.models.checkpoint import Checkpoint

# vLLM's CUDA graphs and process groups belong to the process: one pair at a time.
_process = threading.Lock()


class CorePair:
    """Base and teacher in this process.

    Args:
        base, teacher: the models.
        shares: of the device.
        draft_lengths: the numbers of drafts above 0 that the teacher may verify per step.
        options: further EngineArgs of (base, teacher).
        adapters: LoRA adapters of (base, teacher).
        limits: further arguments of `Core`, for both.

    Raises:
        InvalidRequest: another pair is open in this process.
        ModelUnavailable: vLLM cannot load or run one of the models.
        UnsupportedVersion: this vLLM lacks something that is used here.
    """

    def __init__(
        self,
        base: Checkpoint,
        teacher: Checkpoint,
        shares: Split,
        draft_lengths: Sequence[int],
        options: tuple[Mapping[str, Any], Mapping[str, Any]],
        adapters: tuple[Adapter | None, Adapter | None] = (None, None),
        **limits: Any,
    ) -> None:
        if not _process.acquire(blocking=False):
            raise InvalidRequest(
                "A vLLM pair is open in this process already.",
                "Close it, or use another process.",
            )
        self._opened: list[Core] = []
        self._is_open = True

        try:
            # The larger model first, while memory is in one piece.
            self.teacher = self._open(
                teacher,
                kv_cache_bytes=shares.teacher_cache,
                memory_share=shares.teacher_share,
                draft_lengths=draft_lengths,
                options=options[1],
                adapter=adapters[1],
                **limits,
            )
            self.base = self._open(
                base,
                kv_cache_bytes=shares.base_cache,
                memory_share=shares.base_share,
                draft_lengths=(),
                options=options[0],
                adapter=adapters[0],
                **limits,
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Frees both models and lets the process open another pair; may be called twice."""
        if self._is_open:
            self._is_open = False
            while self._opened:
                self._opened.pop(0).close()
            _process.release()

    def _open(self, checkpoint: Checkpoint, **arguments: Any) -> Core:
        options = {"trust_remote_code": checkpoint.trust_remote_code, **arguments.pop("options")}
        core = Core(checkpoint.name, options=options, **arguments)
        self._opened.append(core)
        return core

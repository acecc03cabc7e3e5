"""The two engine cores of one process, as every rank opens them; knows the order in which they open and close."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midlogit.decide import decider_for
from midlogit.decide.base import Decider
from midlogit.engines.draft_length import DraftLength, SpeculationOption
from midlogit.engines.vllm.adapters import Adapter
from midlogit.engines.vllm.core import Core
from midlogit.engines.vllm.executor import executor_of
from midlogit.engines.vllm.guesses import read_lengths
from midlogit.engines.vllm.memory import Split
from midlogit.engines.vllm.options import draft_length
from midlogit.errors import InvalidRequest

# vLLM's CUDA graphs and process groups belong to the process: one pair at a time.
_process = threading.Lock()


class CorePair:
    """Base and teacher in this process.

    Args:
        base, teacher: the models' folders or hub ids.
        shares: of the device.
        draft_lengths: the numbers of drafts above 0 that a step of (base, teacher) may read.
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
        base: str,
        teacher: str,
        shares: Split,
        draft_lengths: tuple[Sequence[int], Sequence[int]],
        options: Sequence[Mapping[str, Any]],
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
                draft_lengths=draft_lengths[1],
                options=options[1],
                adapter=adapters[1],
                **limits,
            )
            self.base = self._open(
                base,
                kv_cache_bytes=shares.base_cache,
                memory_share=shares.base_share,
                draft_lengths=draft_lengths[0],
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

    def _open(self, model: str, **arguments: Any) -> Core:
        core = Core(model, **arguments)
        self._opened.append(core)
        return core


@dataclass(frozen=True, slots=True)
class Opening:
    """What a rank needs in order to open its share of both models.

    Attributes:
        models: base and teacher. shares, options, adapters, limits: as of `CorePair`.
        speculation: how many tokens to draft, where this vLLM can verify them.
        vocabulary: ids below it are drawn.
        size: number of ranks. port: where rank 0 brings them together.
    """

    models: tuple[str, str]
    shares: Split
    options: Sequence[Mapping[str, Any]]
    adapters: tuple[Adapter | None, Adapter | None]
    limits: Mapping[str, Any]
    speculation: SpeculationOption
    vocabulary: int
    size: int
    port: int

    def open(self, rank: int) -> tuple[CorePair, Decider, DraftLength]:
        """Loads this rank's share; all ranks do so at the same time.

        Raises:
            MidlogitError: as of `CorePair`.
        """
        lengths, shared = draft_length(self.speculation), {}
        if self.size > 1:
            executor = executor_of(rank, self.port)
            shared = {
                "tensor_parallel_size": self.size,
                "distributed_executor_backend": executor,
            }

        cores = CorePair(
            *self.models,
            self.shares,
            read_lengths(lengths.choices, has_adapter=any(self.adapters)),
            [{**own, **shared} for own in self.options],
            self.adapters,
            **self.limits,
        )
        decider = decider_for(self.vocabulary, cores.base.device)
        decider.warm_up(cores.base.empty_logits(), cores.teacher.empty_logits())
        return cores, decider, lengths

"""Two vLLM engine cores in lock-step: each step draws one token for every sequence that is ready on both sides.

Knows the order of the work and which rows belong together; vLLM is behind `Core`, α and the draw behind the policy.
A step first waits for the tokens of the one before, hands them to both model runners and enqueues their next forwards
and the draw; schedulers are told and texts written while the device works (docs/vllm.md).
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from midlogit import fused
from midlogit.checkpoint import Checkpoint
from midlogit.engines.base import Engine, SteppingEngine
from midlogit.engines.vllm.adapter import Core, require_options, require_vllm
from midlogit.engines.vllm.memory import Need, Split, split, split_cpu
from midlogit.errors import InvalidRequest
from midlogit.sampling.policy import Decision, RowSettings, decide
from midlogit.sampling.scoring import Scored
from midlogit.sampling.sequence import Sequence

if TYPE_CHECKING:
    from midlogit.fused.decide import FusedPolicy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16}
SHORTEST_CONTEXT = 2048  # tokens that a cache must hold when no context is asked for

_the_pair = threading.Lock()  # vLLM's CUDA graphs and process groups belong to the process: one pair at a time


class Drawing(Protocol):
    """The draw of one step, enqueued."""

    def token_ids(self) -> list[int]:
        """The drawn tokens; waits for them."""

    def decisions(self) -> list[Decision]:
        """All that is known of them."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """`Drawing` by the policy's own arrays, made at once."""

    made: list[Decision]

    def token_ids(self) -> list[int]:
        return [decision.token_id for decision in self.made]

    def decisions(self) -> list[Decision]:
        return self.made


class Parts:
    """Drawings of some rows each, as one of all."""

    def __init__(self, parts: list[tuple[list[int], Drawing]]) -> None:
        self._drawings = [drawing for _, drawing in parts]
        order = [row for rows, _ in parts for row in rows]
        self._place = sorted(range(len(order)), key=order.__getitem__)

    def token_ids(self) -> list[int]:
        drawn = [token for drawing in self._drawings for token in drawing.token_ids()]
        return [drawn[place] for place in self._place]

    def decisions(self) -> list[Decision]:
        drawn = [decision for drawing in self._drawings for decision in drawing.decisions()]
        return [drawn[place] for place in self._place]


@dataclass(slots=True)
class Running:
    """A sequence that both cores know, and how many tokens were drawn for it."""

    sequence: Sequence
    drawn: int = 0

    @property
    def next_settings(self) -> RowSettings:
        """What the token after the drawn ones is drawn with; the sequence may not know of the last of them yet."""
        return self.sequence.settings_at(self.drawn)


class VllmEngine(SteppingEngine):
    """Two models in this process, on one device, behind two vLLM engine cores.

    Args:
        base, teacher: what is known of the models without their weights.
        vocabulary: columns of logits that both share.
        dtype: as vLLM names it; "auto" is the model's own, float32 on the CPU.
        gpu_memory_utilization: share of the device for both together.
        kv_cache_memory_bytes: sizes of the caches of (base, teacher); None splits what is left.
        max_num_seqs: most sequences that run at once. max_model_len: most tokens of one, None for the models' own.
        options: further EngineArgs of vLLM, for both.

    Raises:
        DoesNotFit: the two models and their caches are larger than the device.
        ModelUnavailable: vLLM cannot run one of the models.
        InvalidRequest: an option that cannot be honoured, or another pair is open in this process.
        MissingExtra, UnsupportedVersion: no vLLM, or one that is not known.
    """

    def __init__(
        self,
        base: Checkpoint,
        teacher: Checkpoint,
        *,
        vocabulary: int,
        dtype: str,
        gpu_memory_utilization: float,
        kv_cache_memory_bytes: tuple[int, int] | None,
        max_num_seqs: int,
        max_model_len: int | None,
        options: Mapping[str, Any],
    ) -> None:
        require_vllm()
        require_options(options)
        shares = _split(
            base, teacher, dtype, gpu_memory_utilization, kv_cache_memory_bytes, max_num_seqs, max_model_len
        )
        common: dict[str, Any] = {
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "options": options,
            "dtype": dtype,
        }
        if not _the_pair.acquire(blocking=False):
            raise InvalidRequest("A vLLM pair is open in this process already.", "Close it, or use another process.")
        self._holds_process = True
        self._cores: list[Core] = []
        try:
            # The larger first, while memory is in one piece.
            for name, cache, share in (
                (teacher.name, shares.teacher_cache, shares.teacher_share),
                (base.name, shares.base_cache, shares.base_share),
            ):
                self._cores.insert(0, Core(name, kv_cache_bytes=cache, memory_share=share, **common))
        except BaseException:
            self._close_cores()
            raise
        self._base, self._teacher = self._cores
        self._vocabulary = vocabulary
        self._keys = map(str, itertools.count())
        self._running: dict[str, Running] = {}
        self._in_flight: tuple[list[str], Drawing] | None = None
        self._fused: FusedPolicy | None = None
        if fused.available(self._base.device):
            from midlogit.fused.decide import FusedPolicy

            self._fused = FusedPolicy(vocabulary, self._base.device)
        super().__init__()

    @property
    def cores(self) -> tuple[Core, Core]:
        """The engine cores of base and teacher."""
        return self._base, self._teacher

    def _run(self) -> None:
        torch.get_num_threads()  # gives this thread torch's OpenMP team, which vLLM's CPU attention counts beforehand
        super()._run()

    def place(self, sequence: Sequence) -> None:
        request = sequence.request
        limit = min(request.params.max_tokens, request.room)
        key = next(self._keys)
        self._base.add(key, request.base_ids, limit)
        self._teacher.add(key, request.teacher_ids, limit)
        self._running[key] = Running(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._leave([key for key, running in self._running.items() if running.sequence is sequence])

    def score(self, scored: list[Scored]) -> None:
        Engine.score(self, scored)

    def forget(self, scored: list[Scored]) -> None:
        Engine.forget(self, scored)

    def score_some(self, unscored: deque[Scored]) -> None:
        raise AssertionError("no text comes here to be scored")

    def close(self) -> None:
        super().close()
        self._close_cores()

    def _close_cores(self) -> None:
        if self._holds_process:
            self._holds_process = False
            while self._cores:
                self._cores.pop().close()
            _the_pair.release()

    @torch.inference_mode()
    def step(self) -> None:
        previous, self._in_flight = self._in_flight, None
        tokens = {}
        if previous is not None:
            tokens = dict(zip(previous[0], previous[1].token_ids(), strict=True))  # waits for the device
        ended = self._ended_by(tokens)
        # From here to the first forward the device is idle; the second is prepared while the first runs.
        ready = []
        for core in self.cores:
            core.take(tokens)
            core.plan()  # nothing, unless the engine was idle
            ready.append(core.launch())
        base_rows, teacher_rows = ready
        # Sequences that have ended since the step was planned are among its rows.
        drawable = self._running.keys() & base_rows.keys() & teacher_rows.keys() - ended
        rows = [(key, row, teacher_rows[key]) for key, row in base_rows.items() if key in drawable]
        if rows:
            self._in_flight = [key for key, _, _ in rows], self._draw(rows)
        for core, here, there in ((self._base, base_rows, teacher_rows), (self._teacher, teacher_rows, base_rows)):
            core.hold(here.keys() - there.keys())
            core.settle()
            core.abort(ended)
            core.plan()
        if previous is not None:
            self._publish(*previous)

    def _ended_by(self, tokens: Mapping[str, int]) -> set[str]:
        """Counts the drawn tokens; the keys of sequences that end with theirs by its id.

        Those that end by length vLLM ends itself; stop strings are found when the text is written.
        """
        ended = set()
        for key, token in tokens.items():
            running = self._running.get(key)
            if running is not None:
                running.drawn += 1
                if token in running.sequence.request.outcomes.ending:
                    ended.add(key)
        return ended

    def _draw(self, rows: list[tuple[str, int, int]]) -> Drawing:
        """Draws for (key, row of the base, row of the teacher): by the kernels what they can, the rest by arrays."""
        asked = [self._running[key].next_settings for key, _, _ in rows]
        if self._fused is None:
            return self._draw_by_arrays(rows, asked)
        by_kernel = [n for n, settings in enumerate(asked) if self._fused.handles(settings)]
        if len(by_kernel) == len(rows):
            return self._draw_by_kernel(rows, asked)
        by_arrays = sorted(set(range(len(rows))).difference(by_kernel))
        ways = ((by_kernel, self._draw_by_kernel), (by_arrays, self._draw_by_arrays))
        return Parts([(some, draw([rows[n] for n in some], [asked[n] for n in some])) for some, draw in ways if some])

    def _draw_by_kernel(self, rows: list[tuple[str, int, int]], asked: list[RowSettings]) -> Drawing:
        assert self._fused is not None
        _, base_rows, teacher_rows = zip(*rows, strict=True)
        prepared = self._fused.prepare(asked, base_rows, teacher_rows)
        return self._fused.launch(self._base.logits, self._teacher.logits, prepared)

    def _draw_by_arrays(self, rows: list[tuple[str, int, int]], asked: list[RowSettings]) -> Drawing:
        base_NV = _taken(self._base.logits, [row for _, row, _ in rows], self._vocabulary)
        teacher_NV = _taken(self._teacher.logits, [row for _, _, row in rows], self._vocabulary)
        return Drawn(decide(base_NV, teacher_NV, asked))

    def _publish(self, keys: list[str], drawing: Drawing) -> None:
        """Gives each sequence its token, unless it ended since the draw."""
        for key, decision in zip(keys, drawing.decisions(), strict=True):
            running = self._running.get(key)
            if running is not None:
                running.sequence.append(decision)
        self._leave([key for key in keys if key in self._running and self._running[key].sequence.is_finished])

    def _leave(self, keys: list[str]) -> None:
        for core in self.cores:
            core.abort(keys)
        for key in keys:
            del self._running[key]


def _taken(logits_RV: Tensor, rows: list[int], vocabulary: int) -> Tensor:
    index_N = torch.tensor(rows, device=logits_RV.device)
    return logits_RV[index_N, :vocabulary].to(torch.promote_types(logits_RV.dtype, torch.float32))


def _split(
    base: Checkpoint,
    teacher: Checkpoint,
    dtype: str,
    utilization: float,
    given: tuple[int, int] | None,
    max_num_seqs: int,
    max_model_len: int | None,
) -> Split:
    base_need, teacher_need = (Need.of(c, _dtype_of(c, dtype), max_num_seqs) for c in (base, teacher))
    if not torch.cuda.is_available():
        return split_cpu(base_need, teacher_need, given)
    free, total = torch.cuda.mem_get_info()
    context = max_model_len or min(base.max_context, teacher.max_context, SHORTEST_CONTEXT)
    return split(base_need, teacher_need, utilization=utilization, context=context, total=total, free=free, given=given)


def _dtype_of(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    own = getattr(checkpoint.config, "dtype", None)
    return DTYPES.get(dtype, own if isinstance(own, torch.dtype) else torch.bfloat16)

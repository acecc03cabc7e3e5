"""Continuous batching of two transformers models: each step draws one token for every running sequence.

Knows both sides and the order of their rows; text, stops and α belong to the sequences and the policy.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from midlogit.checkpoint import Checkpoint
from midlogit.engines.base import SteppingEngine
from midlogit.engines.local.side import Side, load_model
from midlogit.errors import InvalidRequest
from midlogit.sampling.policy import decide
from midlogit.sampling.sequence import Sequence

PREFILL_TOKENS = 4096  # padded prompt tokens that one step starts; bounds activations and latency


def parse_device(name: str) -> torch.device:
    """A device by name; "auto" is CUDA where there is one.

    Raises:
        InvalidRequest: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidRequest(f"Device {name!r} cannot be used: {reason}.", "Use cpu, cuda or cuda:NUMBER.") from error
    return device


def parse_dtype(name: str, device: torch.device) -> torch.dtype:
    """A floating dtype by name; "auto" is float32 on the CPU and bfloat16 elsewhere.

    Raises:
        InvalidRequest: an unknown dtype.
    """
    known = {
        "float32": torch.float32,
        "float64": torch.float64,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in known:
        raise InvalidRequest(f"Unknown dtype {name!r}.", f"Use auto, {', '.join(known)}.")
    return known[name]


class LocalEngine(SteppingEngine):
    """Two causal LMs in this process.

    Args:
        base, teacher: may be the same checkpoint; then the weights are loaded once.
        vocabulary: columns of logits that both share.
        devices: of base and teacher: "auto", "cpu", "cuda", "cuda:1".
        dtype: "auto", "float32", "float64", "bfloat16" or "float16".
        max_num_seqs: most sequences that run at once.

    Raises:
        ModelUnavailable: weights that cannot be loaded or batched.
        InvalidRequest: an unknown device or dtype.
    """

    def __init__(
        self,
        base: Checkpoint,
        teacher: Checkpoint,
        *,
        vocabulary: int,
        devices: tuple[str, str],
        dtype: str,
        max_num_seqs: int,
    ) -> None:
        base_device, teacher_device = (parse_device(name) for name in devices)
        # The larger model first: loading takes a mapping of its file beside the weights.
        teacher_model = load_model(teacher, teacher_device, parse_dtype(dtype, teacher_device))
        same = base.name == teacher.name and base_device == teacher_device
        base_model = teacher_model if same else load_model(base, base_device, parse_dtype(dtype, base_device))
        self._base = Side(base_model, base, vocabulary)
        self._teacher = Side(teacher_model, teacher, vocabulary)
        self._max_num_seqs = max_num_seqs
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        super().__init__()

    def place(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._leave(self._running.index(sequence))
        else:
            self._waiting.remove(sequence)

    def step(self) -> None:
        base_NV, teacher_NV = self._forward(self._admit())
        decisions = decide(base_NV, teacher_NV, [sequence.next_settings for sequence in self._running])
        for sequence, decision in zip(self._running, decisions, strict=True):
            sequence.append(decision)
        self._retire()

    def _admit(self) -> list[Sequence]:
        """Waiting sequences that fit into this step."""
        admitted: list[Sequence] = []
        longest = 0
        while self._waiting and len(self._running) + len(admitted) < self._max_num_seqs:
            request = self._waiting[0].request
            longest = max(longest, len(request.base_ids), len(request.teacher_ids))
            if admitted and longest * (len(admitted) + 1) > PREFILL_TOKENS:
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _forward(self, admitted: list[Sequence]) -> tuple[Tensor, Tensor]:
        """Logits of both models for the running sequences and, behind them, the admitted ones."""
        base_parts, teacher_parts = [], []
        if self._running:
            last = [sequence.token_ids[-1] for sequence in self._running]
            base_parts.append(self._base.advance(last))
            teacher_parts.append(self._teacher.advance(last))
        if admitted:
            base_parts.append(self._base.add([s.request.base_ids for s in admitted]))
            teacher_parts.append(self._teacher.add([s.request.teacher_ids for s in admitted]))
            self._running += admitted
        return torch.cat(base_parts).to(self._teacher.device), torch.cat(teacher_parts)

    def _retire(self) -> None:
        for slot in reversed(range(len(self._running))):
            if self._running[slot].is_finished:
                self._leave(slot)

    def _leave(self, slot: int) -> None:
        """Frees a slot on both sides; the last sequence takes it."""
        self._base.remove(slot)
        self._teacher.remove(slot)
        last = self._running.pop()
        if slot < len(self._running):
            self._running[slot] = last

"""Continuous batching of two transformers models: each step draws a token or more for every running sequence.

Knows both sides, the order of their rows and which drafts still stand; text, stops and α belong to the sequences and
the policy.
"""

from __future__ import annotations

import time
from collections import deque

import torch
from torch import Tensor

from midlogit.decide.arrays import decide, draft
from midlogit.engines.base import SteppingEngine
from midlogit.engines.draft_length import DraftLength
from midlogit.engines.local.side import Side, load_model
from midlogit.errors import InvalidRequest
from midlogit.models.checkpoint import Checkpoint
from midlogit.outputs import Decision
from midlogit.requests.scoring import Scored
from midlogit.requests.sequence import Sequence

SCORED_LOGITS = 2**23  # logits of one side that one step of scoring looks at together
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
        torch.empty(0, device=device).tolist()
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
        vocabulary: ids that both have.
        devices: of base and teacher: "auto", "cpu", "cuda", "cuda:1".
        dtype: "auto", "float32", "float64", "bfloat16" or "float16".
        max_num_seqs: most sequences that run at once.
        draft_length: how many tokens to draft ahead.

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
        draft_length: DraftLength,
    ) -> None:
        base_device, teacher_device = (parse_device(name) for name in devices)
        # The larger model first: loading takes a mapping of its file beside the weights.
        teacher_model = load_model(teacher, teacher_device, parse_dtype(dtype, teacher_device))
        same = base.name == teacher.name and base_device == teacher_device
        base_model = teacher_model if same else load_model(base, base_device, parse_dtype(dtype, base_device))
        self._base = Side(base_model, base)
        self._teacher = Side(teacher_model, teacher)
        self._vocabulary = vocabulary
        self._max_num_seqs = max_num_seqs
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        super().__init__(draft_length)

    def place(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._leave(self._running.index(sequence))
        else:
            self._waiting.remove(sequence)

    def step(self) -> None:
        """Drafts with the base, has the teacher read the drafts, and draws each token as long as drafts stand."""
        start = time.perf_counter()
        old = len(self._running)
        admitted = self._admit()
        drafts = self._drafts() if old else 0
        drafted_KN, base_KNV, teacher_KNV = self._forward(admitted, drafts)
        checked, stood = [0] * old, [0] * old
        alive = list(range(old + len(admitted)))
        for place in range(drafts + 1):
            self._draw(alive, base_KNV[place], teacher_KNV[place])
            alive = [n for n in alive if n < old] if place < drafts else []  # nothing is drafted for admitted ones
            for n in alive:
                checked[n] += 1
                stood[n] += self._stands(n, drafted_KN[place][n])
            alive = [n for n in alive if stood[n] > place and not self._running[n].is_finished]
        self._roll_back([drafts - n for n in stood] + [0] * len(admitted))
        self.draft_length.record_acceptance(drafts, stood, checked)
        if not admitted:
            self.draft_length.record_time(old, drafts, time.perf_counter() - start)
        self._retire()

    def _drafts(self) -> int:
        """How many tokens to draft for the running sequences; none beyond the end of a context."""
        left = min(s.request.max_new_tokens - len(s.token_ids) for s in self._running)
        return min(self.draft_length.next(len(self._running)), left - 1)

    def _draw(self, alive: list[int], base_NV: Tensor, teacher_NV: Tensor) -> None:
        """Draws and appends the next token of some of the running sequences."""
        some = [self._running[n] for n in alive]
        if not some:
            return
        if len(some) < len(base_NV):
            base_NV, teacher_NV = base_NV[alive], teacher_NV[alive]
        decisions = decide(base_NV, teacher_NV, [sequence.next_settings for sequence in some])
        for sequence, decision in zip(some, decisions, strict=True):
            sequence.append(decision)

    def _stands(self, n: int, drafted: int) -> bool:
        """Whether the last token of a sequence is the one that was drafted."""
        sequence = self._running[n]
        return sequence.request.outcomes.outcome_of(sequence.token_ids[-1]) == drafted

    def _roll_back(self, surplus: list[int]) -> None:
        """Forgets the last tokens of each running sequence, drafts that did not stand, on both sides."""
        self._base.roll_back(surplus)
        self._teacher.roll_back(surplus)

    def score_some(self, unscored: deque[Scored]) -> None:
        """One forward a side over as many texts as one step may start, their rows decided in chunks."""
        batch = self._fitting(unscored)
        settings = [scored.settings for scored in batch]
        most = max(map(len, settings))
        found: list[list[Decision]] = [[] for _ in batch]
        chunk = max(1, SCORED_LOGITS // (len(batch) * self._vocabulary))
        base_parts = self._base.read([s.request.base_ids[:-1] for s in batch], most, chunk)
        teacher_parts = self._teacher.read([s.request.teacher_ids[:-1] for s in batch], most, chunk)
        column = 0
        for base_NQV, teacher_NQV in zip(base_parts, teacher_parts, strict=True):
            # Right-aligned: text n begins in column most − len(settings[n]).
            cells = [
                (n, q, settings[n][column + q - most + len(settings[n])])
                for n in range(len(batch))
                for q in range(base_NQV.shape[1])
                if column + q >= most - len(settings[n])
            ]
            index = torch.tensor([[n, q] for n, q, _ in cells]).T
            rows = base_NQV[tuple(index.to(base_NQV.device))], teacher_NQV[tuple(index.to(teacher_NQV.device))]
            decisions = decide(rows[0].to(self._teacher.device), rows[1], [s for _, _, s in cells])
            for (n, _, _), decision in zip(cells, decisions, strict=True):
                found[n].append(decision)
            column += base_NQV.shape[1]
        for scored, decisions in zip(batch, found, strict=True):
            unscored.popleft()
            scored.finish(decisions)

    def _fitting(self, unscored: deque[Scored]) -> list[Scored]:
        """The first texts that fit into this step: its time, of which the solver takes most, is also others'."""
        batch: list[Scored] = []
        longest = 0
        most = min(PREFILL_TOKENS, SCORED_LOGITS // self._vocabulary)
        for scored in unscored:
            longest = max(longest, len(scored.request.base_ids), len(scored.request.teacher_ids))
            if batch and (len(batch) == self._max_num_seqs or longest * (len(batch) + 1) > most):
                break
            batch.append(scored)
        return batch

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

    def _forward(self, admitted: list[Sequence], drafts: int) -> tuple[list[list[int]], list[Tensor], list[Tensor]]:
        """Drafted tokens, and the logits of both models behind the last token and behind each draft.

        Rows are the running sequences and, at the first place, behind them the admitted ones.
        """
        drafted_KN: list[list[int]] = []
        base_KNV: list[Tensor] = []
        teacher_KNV: list[Tensor] = []
        if self._running:
            fed = [[sequence.token_ids[-1]] for sequence in self._running]
            for place in range(drafts):
                base_KNV.append(self._base.advance([tokens[-1] for tokens in fed]))
                ahead = [s.settings_at(len(s.token_ids) + place) for s in self._running]
                drafted_KN.append(draft(base_KNV[-1], ahead, self._vocabulary))
                for tokens, token in zip(fed, drafted_KN[-1], strict=True):
                    tokens.append(token)
            base_KNV.append(self._base.advance([tokens[-1] for tokens in fed]))
            teacher_KNV += self._teacher.extend(fed)
        if admitted:
            base_KNV[:1] = [torch.cat([*base_KNV[:1], self._base.add([s.request.base_ids for s in admitted])])]
            teacher_KNV[:1] = [
                torch.cat([*teacher_KNV[:1], self._teacher.add([s.request.teacher_ids for s in admitted])])
            ]
            self._running += admitted
        return drafted_KN, [rows_NV.to(self._teacher.device) for rows_NV in base_KNV], teacher_KNV

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

"""Continuous batching of two transformers models: each step samples one or more tokens per running sequence.

Knows both models, the order of their rows and which drafts were accepted. Text, stops and α belong to the sequences
and the decider.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from midlogit.core.rejection import num_accepted
from midlogit.decide import decider_for
from midlogit.decide.array_decider import ArrayDecider
from midlogit.decide.base import Decider, LogitRows
from midlogit.engines.base import Scoring, Weights
from midlogit.engines.draft_length import DraftLength
from midlogit.engines.layout import Layout
from midlogit.engines.local.loading import Modules, load_models
from midlogit.engines.local.model import SlotModel
from midlogit.engines.stepping import SteppingEngine
from midlogit.engines.weights import (
    NamedTensors,
    check_weights,
    checksum,
    shares_weights,
    write_weights,
)
from midlogit.errors import InvalidRequest
from midlogit.models.checkpoint import Checkpoint
from midlogit.outputs import Decision
from midlogit.requests.scoring import Scored
from midlogit.requests.sequence import Sequence

SCORED_LOGITS = 2**23  # logits of one side that one step of scoring looks at together
PREFILL_TOKENS = 4096  # padded prompt tokens that one step starts; bounds activations and latency


@dataclass(frozen=True, slots=True)
class Round:
    """Drafts and logits of one step, position by position.

    Attributes:
        drafts_PN: drafted token ids; N sequences ran before the step.
        base_PNV, teacher_PNV: logits after the last token and after each draft, one position more than drafts. The
            first position also has the rows of admitted sequences, after the others.
    """

    drafts_PN: list[list[int]]
    base_PNV: list[Tensor]
    teacher_PNV: list[Tensor]


class LocalEngine(SteppingEngine[Sequence | Scored], Scoring):
    """Two causal LMs in this process.

    Args:
        base, teacher: may be the same checkpoint; then the weights are loaded once.
        modules: of base and teacher, where they are loaded already; they stay where they are and as they are.
        vocabulary: token ids that both models have.
        devices: of base and teacher: "auto", "cpu", "cuda", "cuda:1".
        dtype: "auto", "float32", "float64", "bfloat16" or "float16".
        max_num_seqs: most sequences that run at once.
        draft_length: chooses the number of drafts per round.

    Attributes:
        base, teacher: the models with their caches. decider: turns their logits into tokens.

    Raises:
        ModelUnavailable: weights that cannot be loaded or batched.
        InvalidRequest: an unknown device or dtype.
    """

    def __init__(
        self,
        base: Checkpoint,
        teacher: Checkpoint,
        *,
        modules: Modules,
        vocabulary: int,
        devices: tuple[str, str],
        dtype: str,
        max_num_seqs: int,
        draft_length: DraftLength,
    ) -> None:
        super().__init__(draft_length, max_num_seqs)
        base_model, teacher_model = load_models(base, teacher, modules, devices, dtype)
        self._shared = [module for module in modules if module is not None]
        self.base = SlotModel(base_model, base, is_shared=modules[0] is not None)
        self.teacher = SlotModel(teacher_model, teacher, is_shared=modules[1] is not None)

        self._vocabulary = vocabulary
        self.decider = self._choose_decider()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._unscored: deque[Scored] = deque()

    def _choose_decider(self) -> Decider:
        """Kernels take no float64: it is for comparisons."""
        if torch.float64 in (self.base.model.dtype, self.teacher.model.dtype):
            return ArrayDecider(self._vocabulary)
        decider = decider_for(self._vocabulary, self.teacher.device)
        rows = self.base.empty_logits(), self.teacher.empty_logits()
        decider.warm_up(*(row.to(self.teacher.device) for row in rows))
        return decider

    def submit(self, sequence: Sequence) -> None:
        self._take([sequence])

    def abort(self, sequences: list[Sequence]) -> None:
        self._drop([*sequences])

    def score(self, texts: list[Scored]) -> None:
        self._take([*texts])

    def forget(self, texts: list[Scored]) -> None:
        self._drop([*texts], silently=True)

    def add(self, job: Sequence | Scored) -> None:
        if isinstance(job, Scored):
            self._unscored.append(job)
        else:
            self._waiting.append(job)

    def remove(self, job: Sequence | Scored) -> None:
        if isinstance(job, Scored):
            self._unscored.remove(job)
        elif job in self._running:
            self._free_slot(self._running.index(job))
        else:
            self._waiting.remove(job)

    def begun(self) -> list[Sequence | Scored]:
        return [*self._running]

    def shares_base(self, module: Module) -> bool:
        return shares_weights(self.base.model, module)

    def check_weights(self, weights: Weights | None) -> NamedTensors | None:
        if self._shared and shares_weights(self.base.model, self.teacher.model):
            raise InvalidRequest(
                "Base and teacher share their weights: both would change.",
                "Give the teacher as a module of its own, or as a folder.",
            )
        if weights is not None:
            return check_weights(weights, Layout.of(self.base.model))
        if self.base.model not in self._shared:
            raise InvalidRequest(
                "No weights are given, and the base is no module that changes by itself.",
                "Give named tensors or a folder, or open the pair over the trainer's module.",
            )
        return None

    def load_weights(self, checked: NamedTensors | None) -> None:
        if checked is None:
            return
        if self.base.model is self.teacher.model:  # loaded once, for both
            self.base.model = copy.deepcopy(self.teacher.model)
        write_weights(checked, self.base.model)

    def base_checksum(self) -> int:
        return self.between_steps(lambda: checksum(self.base.model.parameters()))

    def settle(self) -> None:
        """Does nothing: no step leaves anything behind."""

    def recompute(self) -> None:
        """The last token of each sequence is fed in the next step."""
        fed = [[*s.request.base_ids, *s.token_ids[:-1]] for s in self._running]
        self.base.refill(fed, PREFILL_TOKENS)

    def forget_prefixes(self) -> None:
        """Does nothing: no sequence takes anything from another one's cache."""

    def step(self) -> None:
        if self._unscored:
            self._score_batch()
        if self._waiting or self._running:
            self._sample_round()

    def _sample_round(self) -> None:
        """Drafts with the base, has the teacher verify the drafts, and samples each token as long as they agree."""
        start = time.perf_counter()
        num_running = len(self._running)
        admitted = self._schedule()
        num_drafts = self._num_drafts() if num_running else 0

        round_ = self._forward(admitted, num_drafts)
        verified, accepted = self._sample(round_, num_running)
        self._roll_back([num_drafts - n for n in accepted] + [0] * len(admitted))

        self.draft_length.record_acceptance(num_drafts, accepted, verified)
        if not admitted:
            self.draft_length.record_time(num_running, num_drafts, time.perf_counter() - start)
        self._free_finished()

    def _schedule(self) -> list[Sequence]:
        """Takes waiting sequences that fit into this step."""
        admitted: list[Sequence] = []
        longest = 0
        while self._waiting and len(self._running) + len(admitted) < self.max_num_seqs:
            request = self._waiting[0].request
            longest = max(longest, len(request.base_ids), len(request.teacher_ids))
            if admitted and longest * (len(admitted) + 1) > PREFILL_TOKENS:
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _num_drafts(self) -> int:
        """The number of drafts for the running sequences; none beyond the end of a context."""
        remaining = min(s.request.max_new_tokens - len(s.token_ids) for s in self._running)
        return min(self.draft_length.next(len(self._running)), remaining - 1)

    def _forward(self, admitted: list[Sequence], num_drafts: int) -> Round:
        """Runs the base over its own drafts, then the teacher over all of them at once, and the admitted prompts."""
        drafts_PN: list[list[int]] = []
        base_PNV: list[Tensor] = []
        teacher_PNV: list[Tensor] = []

        if self._running:
            fed = [[sequence.token_ids[-1]] for sequence in self._running]
            for position in range(num_drafts):
                base_PNV.append(self._advance_base(fed))
                settings = [s.settings_at(len(s.token_ids) + position) for s in self._running]
                drafts_N = self.decider.start_round(settings, len(fed)).draft(
                    _all_rows(base_PNV[-1])
                )
                drafts_PN.append(drafts_N.tolist())
                for tokens, token_id in zip(fed, drafts_PN[-1], strict=True):
                    tokens.append(token_id)
            base_PNV.append(self._advance_base(fed))
            teacher_PNV += self.teacher.extend(fed)

        if admitted:
            base_NV = self.base.add([s.request.base_ids for s in admitted]).to(self.teacher.device)
            teacher_NV = self.teacher.add([s.request.teacher_ids for s in admitted])
            base_PNV[:1] = [torch.cat([*base_PNV[:1], base_NV])]
            teacher_PNV[:1] = [torch.cat([*teacher_PNV[:1], teacher_NV])]
            self._running += admitted

        return Round(drafts_PN, base_PNV, teacher_PNV)

    def _advance_base(self, fed: list[list[int]]) -> Tensor:
        """Runs the base over the last token of each row; its logits [N, V] on the teacher's device."""
        return self.base.advance([tokens[-1] for tokens in fed]).to(self.teacher.device)

    def _sample(self, round_: Round, num_running: int) -> tuple[list[int], list[int]]:
        """Samples and appends tokens position by position, until a draft is rejected or the sequence has ended.

        Args:
            num_running: the first rows, for which tokens were drafted; admitted sequences follow.

        Returns:
            (verified, accepted) drafts of each sequence that ran before.
        """
        alive = list(range(len(self._running)))
        sampled: list[list[int]] = [[] for _ in alive]
        for position in range(len(round_.base_PNV)):
            self._sample_position(
                alive, round_.base_PNV[position], round_.teacher_PNV[position], sampled
            )
            if position == len(round_.drafts_PN):
                break
            drafts_N = round_.drafts_PN[position]
            alive = [
                n
                for n in alive
                if n < num_running
                and sampled[n][-1] == drafts_N[n]
                and not self._running[n].is_finished
            ]

        drafts = list(zip(*round_.drafts_PN, strict=True)) or [()] * num_running
        verified = [min(len(sampled[n]), len(drafts[n])) for n in range(num_running)]
        return verified, [num_accepted(drafts[n], sampled[n]) for n in range(num_running)]

    def _sample_position(
        self, alive: list[int], base_NV: Tensor, teacher_NV: Tensor, sampled: list[list[int]]
    ) -> None:
        """Samples the next token of some running sequences; notes the outcome that each counts for in `sampled`."""
        if not alive:
            return
        settings = [self._running[n].next_settings for n in alive]
        decided = self.decider.decide(
            LogitRows(base_NV, alive), LogitRows(teacher_NV, alive), settings
        )
        for n, decision in zip(alive, decided.decisions(), strict=True):
            sequence = self._running[n]
            sequence.append(decision, self.base_version)
            sampled[n].append(sequence.request.outcomes.outcome_of(decision.token_id))

    def _roll_back(self, surplus: list[int]) -> None:
        """Forgets rejected drafts, the last tokens of each running sequence, on both sides."""
        self.base.roll_back(surplus)
        self.teacher.roll_back(surplus)

    def _free_finished(self) -> None:
        for slot in reversed(range(len(self._running))):
            if self._running[slot].is_finished:
                self._free_slot(slot)

    def _free_slot(self, slot: int) -> None:
        """Frees a slot on both sides; the last sequence takes it."""
        self.base.remove(slot)
        self.teacher.remove(slot)
        last = self._running.pop()
        if slot < len(self._running):
            self._running[slot] = last

    def _score_batch(self) -> None:
        """Runs one forward per side over as many texts as fit, and decides their rows in chunks."""
        batch = self._scorable()
        settings = [scored.settings for scored in batch]
        most = max(map(len, settings))
        chunk = max(1, SCORED_LOGITS // (len(batch) * self._vocabulary))
        base_parts = self.base.read([s.request.base_ids[:-1] for s in batch], most, chunk)
        teacher_parts = self.teacher.read([s.request.teacher_ids[:-1] for s in batch], most, chunk)

        decisions: list[list[Decision]] = [[] for _ in batch]
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
            base_RV = base_NQV[tuple(index.to(base_NQV.device))].to(self.teacher.device)
            teacher_RV = teacher_NQV[tuple(index.to(teacher_NQV.device))]

            cell_settings = [s for _, _, s in cells]
            decided = self.decider.decide(_all_rows(base_RV), _all_rows(teacher_RV), cell_settings)
            for (n, _, _), decision in zip(cells, decided.decisions(), strict=True):
                decisions[n].append(decision)
            column += base_NQV.shape[1]

        for scored, found in zip(batch, decisions, strict=True):
            self._unscored.popleft()
            scored.finish(found)

    def _scorable(self) -> list[Scored]:
        """The first texts that fit into this step; other requests wait for as long as it takes."""
        batch: list[Scored] = []
        longest = 0
        most = min(PREFILL_TOKENS, SCORED_LOGITS // self._vocabulary)
        for scored in self._unscored:
            longest = max(longest, len(scored.request.base_ids), len(scored.request.teacher_ids))
            if batch and (len(batch) == self.max_num_seqs or longest * (len(batch) + 1) > most):
                break
            batch.append(scored)
        return batch


def _all_rows(logits_NV: Tensor) -> LogitRows:
    return LogitRows(logits_NV, range(len(logits_NV)))

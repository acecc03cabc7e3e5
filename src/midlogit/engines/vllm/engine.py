"""The vLLM engine: requests, texts and weights of two models that draw in lock-step, on one device or on several.

Knows sequences and which ranks there are; `Lockstep` knows the order of a step. This process is rank 0. It decides all
that depends on time or on text, and has the other ranks make the same calls (ranks.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import torch

from midlogit.decide.base import Decider
from midlogit.engines.base import Scoring
from midlogit.engines.draft_length import DraftLength
from midlogit.engines.vllm.core import Core
from midlogit.engines.vllm.lockstep import Lockstep
from midlogit.engines.vllm.process import CorePair
from midlogit.engines.vllm.ranks import OnLockstep, Ranks
from midlogit.engines.vllm.rounds import Round
from midlogit.engines.vllm.scoring import DecidedTexts
from midlogit.engines.vllm.transfer import TransferEngine
from midlogit.engines.vllm.wire import RunsSent, add_sent, require_sendable
from midlogit.errors import InvalidRequest
from midlogit.models.checkpoint import Checkpoint
from midlogit.requests.scoring import Scored
from midlogit.requests.sequence import Sequence

STUCK_S = 3.0  # that a step may go on after another rank has ended


class VllmEngine(TransferEngine, Scoring):
    """Two models in two vLLM engine cores.

    Args:
        cores: base and teacher, as far as this rank has them; closed with the engine.
        base: what the base was loaded from.
        decider: decides rows of logits on the cores' device.
        draft_length: chooses γ among those that the teacher can verify.
        max_num_seqs: most sequences that the cores run at once.
        ranks: the other ranks, closed with the engine.

    Attributes:
        lockstep: makes the steps, in the engine's thread.
    """

    def __init__(
        self,
        cores: CorePair,
        base: Checkpoint,
        decider: Decider,
        draft_length: DraftLength,
        max_num_seqs: int,
        ranks: Ranks,
    ) -> None:
        super().__init__(cores.base, base, draft_length, max_num_seqs)
        self._cores, self._ranks = cores, ranks
        self.lockstep = Lockstep(cores, decider, draft_length, self._publish)
        self.lockstep.scorer.publish = self._publish_texts

        self._new_keys = map(str, itertools.count())
        self._runs: dict[str, Sequence | Scored] = {}
        self._keys: dict[int, str] = {}  # of runs, by identity
        self._ended_runs: list[str] = []  # that have all their tokens or text
        self._sent = RunsSent()

    @property
    def cores(self) -> tuple[Core, Core]:
        """The engine cores of base and teacher."""
        return self.lockstep.cores

    @property
    def transfer_world_size(self) -> int:
        return self._ranks.size

    def start(self) -> None:
        super().start()
        self._ranks.watch(lambda failure: self.end(failure, STUCK_S))

    def _run(self) -> None:
        # Gives this thread torch's OpenMP team, which vLLM's CPU attention counts beforehand.
        torch.get_num_threads()
        super()._run()

    def submit(self, sequence: Sequence) -> None:
        if self._ranks.others:
            try:
                require_sendable(sequence.request.params.alpha_rule)
            except InvalidRequest as error:
                sequence.fail(str(error), "request")
                return
        self._take([sequence])

    def abort(self, sequences: list[Sequence]) -> None:
        self._drop([*sequences])

    def score(self, texts: list[Scored]) -> None:
        self._take([text for text in texts if text.request.given])
        for text in texts:
            if not text.request.given:
                text.finish([])

    def forget(self, texts: list[Scored]) -> None:
        self._drop([*texts], silently=True)

    def add(self, job: Sequence | Scored) -> None:
        key = next(self._new_keys)
        if self._ranks.others:
            self._ranks.tell(add_sent, key, *self._sent.pack(job))
        if isinstance(job, Scored):
            self.lockstep.scorer.add(key, job)
        else:
            self.lockstep.add(key, job)
        self._runs[key] = job
        self._keys[id(job)] = key

    def remove(self, job: Sequence | Scored) -> None:
        key = self._keys.get(id(job))
        if key is not None:
            self._forget([key])

    def begun(self) -> list[Sequence | Scored]:
        return [self._runs[key] for key in self.lockstep.begun()]

    def step(self) -> None:
        seconds, checksum = self.lockstep.measured, self.lockstep.checksum
        self._ranks.send(Lockstep.step, seconds, checksum)
        with self._ranks.explaining():
            self.lockstep.step(seconds, checksum)
        self._forget_ended()

    def settle(self) -> None:
        checksum = self.lockstep.checksum
        self._ranks.send(Lockstep.settle, checksum)
        with self._ranks.explaining():
            self.lockstep.settle(checksum)
        self._forget_ended()

    def on_every_rank(self, call: OnLockstep, *arguments: Any) -> list[Any]:
        self._ranks.send(call, *arguments, is_answered=True)
        try:
            own = call(self.lockstep, *arguments)
        finally:
            others = self._ranks.answers()
        for answer in others:
            if isinstance(answer, Exception):
                raise answer
        return [own, *others]

    def close(self) -> None:
        super().close()
        self._ranks.close()
        if not self.is_stuck:
            self._cores.close()

    def _publish(self, last: Round, tokens: Mapping[str, list[int]]) -> None:
        """Gives each sequence its tokens, unless it has ended since they were decided."""
        decisions = last.decided.decisions()
        for n, key in enumerate(last.keys):
            run = self._runs.get(key)
            if not isinstance(run, Sequence) or run.is_finished:
                continue
            for decision in decisions[n :: len(last.keys)][: len(tokens[key])]:
                if not run.is_finished:
                    run.append(decision, self.base_version)
            if run.is_finished:
                self._ended_runs.append(key)

    def _publish_texts(self, decided: DecidedTexts) -> None:
        """Gives each text its scores, unless it has ended since they were decided."""
        for key, decisions in decided.decisions():
            text = self._runs.get(key)
            if isinstance(text, Scored) and not text.is_finished:
                text.finish(decisions)
                self._ended_runs.append(key)

    def _forget_ended(self) -> None:
        """Has all ranks forget what has ended in a step: only this one has the texts, which may end anywhere."""
        ended, self._ended_runs = self._ended_runs, []
        if ended:
            self._forget(ended)

    def _forget(self, keys: Collection[str]) -> None:
        self._ranks.tell(Lockstep.forget, list(keys))
        self.lockstep.forget(keys)
        for key in keys:
            del self._keys[id(self._runs.pop(key))]

    def _fail(self, error: BaseException) -> None:
        super()._fail(error)
        self._ranks.kill()  # they may be waiting for this one

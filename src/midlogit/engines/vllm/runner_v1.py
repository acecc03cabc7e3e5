"""vLLM's model runner V1 (`vllm.v1.worker.gpu_model_runner`): knows its batch on the host, no scheduler.

Inputs are made from what the host knows; tokens that only the device knows are written over them (inputs.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from midlogit.decide.transfer import to_device
from midlogit.engines.vllm.graphs import DecodeGraphs
from midlogit.engines.vllm.inputs import InputTokens
from midlogit.engines.vllm.internals import require_runner_v1
from midlogit.engines.vllm.runner import DeviceTokens, Runner, padded
from midlogit.engines.vllm.steps import ExecutedStep, ScheduledStep

NO_TOKEN = -1  # what vLLM takes for a rejected draft


class NoDrafts:
    """No-op proposer registered with vLLM and never asked: the other model supplies the drafts."""

    def __init__(self, vllm_config: Any) -> None:
        pass

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        pass

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        raise NotImplementedError


class RunnerV1(Runner):
    """See `Runner`."""

    def __init__(self, executor: Any, draft_lengths: Sequence[int], max_num_seqs: int) -> None:
        super().__init__(executor, draft_lengths, max_num_seqs)
        require_runner_v1(self._runner)

        self._inputs = InputTokens(self._runner)

        # The largest number of drafts has vLLM's own graphs.
        further_lengths = [1 + n for n in (0, *draft_lengths)[:-1]]
        self._graphs = DecodeGraphs(self._runner, further_lengths, max_num_seqs)

    @staticmethod
    def draft_slots(draft_lengths: Sequence[int]) -> dict[str, Any]:
        return {
            "method": "custom_class",
            "model": f"{NoDrafts.__module__}.{NoDrafts.__qualname__}",
            "num_speculative_tokens": draft_lengths[-1],
        }

    @property
    def logits_RV(self) -> Tensor:
        return self._runner.execute_model_state.logits  # type: ignore[no-any-return]

    def hidden_states(self, key: str) -> tuple[int, Tensor]:
        state, batch = self._runner.execute_model_state, self._runner.input_batch
        place = batch.req_id_to_index[key]
        first = self._runner.query_start_loc.np[place]
        last = first + state.scheduler_output.num_scheduled_tokens[key]
        return int(batch.num_computed_tokens_cpu[place]), state.hidden_states[first:last]

    def execute(self, step: ScheduledStep, tokens: DeviceTokens | None) -> ExecutedStep:
        length = 1 + step.num_drafts if step.is_decode else None
        with self._inputs.fed(tokens), self._graphs.selected(length):
            output = self._executor.execute_model(step.scheduler_output)

        # There is an output already where no token was scheduled.
        return ExecutedStep(step, output, self._ready_rows(step) if output is None else {})

    def _ready_rows(self, step: ScheduledStep) -> dict[str, int]:
        """The first row of logits of each ready request."""
        is_unready = self._runner.discard_request_mask.np
        drafts = step.scheduler_output.scheduled_spec_decode_tokens
        rows, row = {}, 0
        for place, key in enumerate(self._runner.input_batch.req_ids):
            if not is_unready[place]:
                rows[key] = row
            row += 1 + len(drafts.get(key, ()))
        return rows

    def sample(self, step: ExecutedStep, tokens: Mapping[str, Sequence[int]]) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        runner, batch = self._runner, self._runner.input_batch
        keys = list(batch.req_ids)
        ids = [list(tokens.get(key, ())) if key in step.rows else [] for key in keys]

        if runner.model_config.is_hybrid:  # its state is that after the accepted drafts
            sampled_RW = to_device(torch.from_numpy(padded(ids, NO_TOKEN)), self.device)
            output = step.scheduled.scheduler_output
            runner._update_states_after_model_execute(sampled_RW, output)

        runner.execute_model_state = None
        self._write({key: sampled for key, sampled in zip(keys, ids, strict=True) if sampled}, 0)
        return ModelRunnerOutput(keys, dict(batch.req_id_to_index), sampled_token_ids=ids)

    def replace_placeholders(self, tokens: Mapping[str, Sequence[int]], count: int) -> None:
        self._write(tokens, count)

    def _write(self, tokens: Mapping[str, Sequence[int]], count: int) -> None:
        """Writes each request's tokens in the place of its last `count`, as vLLM does after its own sampler."""
        batch = self._runner.input_batch
        rows: list[int] = []
        lengths: list[int] = []
        ids: list[int] = []
        for key, sampled in tokens.items():
            known_ids = self._runner.requests[key].output_token_ids
            known_ids[len(known_ids) - count :] = sampled

            row = batch.req_id_to_index.get(key)
            if row is not None:  # else it was preempted since
                rows.append(row)
                lengths.append(len(sampled))
                ids += sampled

        # Each request's tokens end where the next one will stand.
        rows_M, lengths_M = np.array([rows, lengths], dtype=np.intp)
        ends_M = batch.num_tokens_no_spec[rows_M] - count + lengths_M
        batch.num_tokens_no_spec[rows_M] = ends_M
        positions = np.arange(len(ids)) + np.repeat(ends_M - np.cumsum(lengths_M), lengths_M)
        places = np.repeat(rows_M, lengths_M), positions
        batch.token_ids_cpu[places] = ids
        batch.is_token_ids[places] = True

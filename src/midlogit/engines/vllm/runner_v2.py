"""vLLM's model runner V2 (`vllm.v1.worker.gpu`): knows its state of requests on the device, no scheduler.

Positions, lengths and last tokens of all requests live on the device, and a forward pass reads them there. So tokens
that only the device knows are written where vLLM's sampler would have left them, and nothing has to be written back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midlogit.decide.transfer import to_device
from midlogit.engines.vllm.internals import require_runner_v2
from midlogit.engines.vllm.runner import DeviceTokens, Runner, padded
from midlogit.engines.vllm.steps import ExecutedStep, ScheduledStep

STEPS_AHEAD = 2  # steps for which vLLM has buffers on the host that the device reads


class RunnerV2(Runner):
    """See `Runner`."""

    def __init__(self, executor: Any, draft_lengths: Sequence[int], max_num_seqs: int) -> None:
        super().__init__(executor, draft_lengths, max_num_seqs)
        require_runner_v2(self._runner)

        self._logits_RV: Tensor | None = None
        # vLLM puts a placeholder in the place of CUDA's events on a CPU.
        self._executed = deque(torch.cuda.Event() for _ in range(STEPS_AHEAD))  # type: ignore[no-untyped-call]

    @staticmethod
    def draft_slots(draft_lengths: Sequence[int]) -> dict[str, Any]:
        # vLLM captures CUDA graphs for each number of drafts in this table of batch sizes, which no step follows.
        most = draft_lengths[-1]
        numbers = [most, 0, *reversed(draft_lengths[:-1])]
        return {
            "method": "ngram",  # never asked for drafts
            "num_speculative_tokens": most,
            "num_speculative_tokens_per_batch_size": [
                (size, size, number) for size, number in enumerate(numbers, start=1)
            ],
        }

    @property
    def logits_RV(self) -> Tensor:
        assert self._logits_RV is not None
        return self._logits_RV

    def hidden_states(self, key: str) -> tuple[int, Tensor]:
        state = self._runner.execute_model_state
        batch = state.input_batch
        place = batch.req_ids.index(key)
        first, last = batch.query_start_loc_np[place : place + 2]
        return int(batch.num_computed_tokens_np[place]), state.hidden_states[first:last]

    def execute(self, step: ScheduledStep, tokens: DeviceTokens | None) -> ExecutedStep:
        # The device may still read the host's buffers for the inputs of that many steps.
        self._executed[0].synchronize()
        if tokens is not None:
            self._feed(step, tokens)
        output = self._executor.execute_model(step.scheduler_output)
        if output is not None:  # no token was scheduled
            return ExecutedStep(step, output, {})

        state = self._runner.execute_model_state
        batch = state.input_batch
        states_RH = state.hidden_states[batch.logits_indices]
        self._logits_RV = self.model.compute_logits(states_RH)  # type: ignore[operator]
        self._executed[0].record()
        self._executed.rotate(-1)
        return ExecutedStep(step, None, _ready_rows(batch))

    def _feed(self, step: ScheduledStep, tokens: DeviceTokens) -> None:
        """Writes device tokens where the next forward pass reads the last token of each request, and drafts."""
        states = self._runner.req_states
        places_N = to_device([states.req_id_to_index[key] for key in tokens.keys], self.device)
        num_last = tokens.tokens_NQ.shape[1] - step.num_drafts
        if num_last:
            states.last_sampled_tokens[places_N] = tokens.tokens_NQ[:, :num_last]
        if step.num_drafts:
            states.draft_tokens[places_N, : step.num_drafts] = tokens.tokens_NQ[:, num_last:]

        # Each step's token was counted when it was sampled.
        if tokens.num_rejected_N is not None:
            num_rejected_N = tokens.num_rejected_N.to(torch.int32)
            states.num_computed_tokens.gpu[places_N] -= num_rejected_N
            states.total_len.gpu[places_N] -= num_rejected_N

    def sample(self, step: ExecutedStep, tokens: Mapping[str, Sequence[int]]) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        batch = self._runner.execute_model_state.input_batch
        self._runner.execute_model_state = self._logits_RV = None
        ids = [list(tokens.get(key, ())) if key in step.rows else [] for key in batch.req_ids]

        num_sampled_R = np.array([len(sampled) for sampled in ids])

        # Rows of logits that gave no token are rejected: their tokens are computed again.
        is_ready_R = np.array([key in step.rows for key in batch.req_ids])
        num_rejected_R = (np.diff(batch.cu_num_logits_np) - num_sampled_R) * is_ready_R
        self._postprocess(batch, padded(ids, 0), num_sampled_R, num_rejected_R)

        places = {key: place for place, key in enumerate(batch.req_ids)}
        return ModelRunnerOutput(batch.req_ids, places, sampled_token_ids=ids)

    def _postprocess(self, batch: Any, *numbers: NDArray[np.integer]) -> None:
        """Updates the state of the requests on the device, as vLLM does after its own sampler."""
        flat = np.concatenate([array.ravel() for array in numbers]).astype(np.int32)
        flat_on_device = to_device(torch.from_numpy(flat), self.device)
        parts = torch.split(flat_on_device, [array.size for array in numbers])
        sampled_RW, num_sampled_R, num_rejected_R = (
            part.view(array.shape) for part, array in zip(parts, numbers, strict=True)
        )
        self._runner.postprocess_sampled(
            batch.idx_mapping, sampled_RW, num_sampled_R, num_rejected_R, batch.query_start_loc
        )

    def replace_placeholders(self, tokens: Mapping[str, Sequence[int]], count: int) -> None:
        """Does nothing: the device had the tokens from the start."""


def _ready_rows(batch: Any) -> dict[str, int]:
    """The first row of logits of each ready request."""
    num_computed_R = batch.num_computed_tokens_np + batch.num_scheduled_tokens
    is_ready_R = num_computed_R >= batch.prefill_len_np
    rows = batch.cu_num_logits_np.tolist()
    return {key: rows[place] for place, key in enumerate(batch.req_ids) if is_ready_R[place]}

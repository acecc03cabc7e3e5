"""Input tokens of a forward pass that only the device knows; knows buffers of model runner V1, no scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from midlogit.decide.transfer import to_device
from midlogit.engines.vllm.runner import DeviceTokens


class InputTokens:
    """Writes device tokens into the input ids of a model runner, after vLLM has filled in what the host knows.

    Args:
        runner: vLLM's GPUModelRunner, whose `_prepare_input_ids` is extended.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._device = torch.device(runner.device)
        self._tokens: DeviceTokens | None = None
        self._prepare_input_ids = runner._prepare_input_ids
        runner._prepare_input_ids = self._prepare
        if self._device.type == "cuda":
            # Guards the host buffers of a forward pass's inputs: a drafting core runs several passes ahead.
            runner.prepare_inputs_event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextmanager
    def fed(self, tokens: DeviceTokens | None) -> Iterator[None]:
        """Feeds these tokens to the step that is executed within."""
        # Lengths that only the device knows are vLLM's own case of drafts under asynchronous scheduling.
        has_device_lengths = tokens is not None and tokens.num_rejected_N is not None
        self._runner.use_async_spec_decode = has_device_lengths
        self._tokens = tokens
        try:
            yield
        finally:
            self._tokens = None

    def _prepare(self, scheduled: Any, num_requests: int, num_tokens: int, ends_R: Any) -> None:
        """Fills in the input ids of a forward pass, in place of vLLM's `_prepare_input_ids`.

        Args:
            ends_R: where the tokens of each row of the batch end.
        """
        self._prepare_input_ids(scheduled, num_requests, num_tokens, ends_R)
        if self._tokens is None:
            return

        # Requests that were preempted since the tokens were sampled have left the batch.
        keys, tokens_NQ = self._tokens.keys, self._tokens.tokens_NQ
        num_rejected_N = self._tokens.num_rejected_N
        row_of = self._runner.input_batch.req_id_to_index
        present = [n for n, key in enumerate(keys) if key in row_of]
        if not present:
            return
        if len(present) < len(keys):
            present_M = to_device(present, self._device)
            tokens_NQ = tokens_NQ[present_M]
            num_rejected_N = None if num_rejected_N is None else num_rejected_N[present_M]

        rows_N = np.asarray([row_of[keys[n]] for n in present], dtype=np.int64)
        width = tokens_NQ.shape[1]
        places = (ends_R[rows_N][:, None] - width + np.arange(width)).ravel()
        input_ids = self._runner.input_ids.gpu
        span = slice(places[0], places[0] + len(places))
        if np.array_equal(places, np.arange(span.start, span.stop)):
            input_ids[span] = tokens_NQ.reshape(-1)  # most drafting steps: no places to copy
        else:
            input_ids[to_device(torch.from_numpy(places), self._device)] = tokens_NQ.reshape(-1).to(
                input_ids.dtype
            )

        if num_rejected_N is not None:
            self._move_back(
                to_device(torch.from_numpy(rows_N), self._device),
                num_rejected_N,
                num_requests,
                num_tokens,
            )

    def _move_back(
        self, rows_N: Tensor, num_rejected_N: Tensor, num_requests: int, num_tokens: int
    ) -> None:
        """Moves the tokens of some rows to earlier positions in the forward pass that is being prepared."""
        runner = self._runner
        dtype = runner.num_computed_tokens.dtype
        offset_R = torch.zeros(num_requests, dtype=dtype, device=self._device)
        offset_R[rows_N] = num_rejected_N.to(offset_R.dtype)

        runner.num_computed_tokens[:num_requests] -= offset_R
        runner.seq_lens[:num_requests] -= offset_R
        runner.positions[:num_tokens] -= offset_R[runner.req_indices.gpu[:num_tokens]]

        starts_R = runner.query_start_loc.gpu[: num_requests + 1]
        positions_T = runner.positions[:num_tokens]
        runner.input_batch.block_table.compute_slot_mapping(num_requests, starts_R, positions_T)

"""What a core needs of a model runner of vLLM, and what V1 and V2 have alike; knows no scheduler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from midlogit.engines.vllm.steps import ExecutedStep, ScheduledStep


@dataclass(frozen=True, slots=True)
class DeviceTokens:
    """Input tokens of N requests that are on the device and not yet on the host.

    Attributes:
        keys: the requests.
        tokens_NQ: the last Q tokens that the forward pass computes of each.
        num_rejected_N: how many of each request's placeholders were rejected, where the host does not know it yet:
            its tokens are that many positions earlier than scheduled.
    """

    keys: Sequence[str]
    tokens_NQ: Tensor
    num_rejected_N: Tensor | None = None


class Runner(ABC):
    """Runs the forward passes of one core, and takes the tokens in place of vLLM's own sampler.

    Args:
        executor: of the core.
        draft_lengths: the numbers of drafts above 0 that a step may verify, in order.
        max_num_seqs: the largest batch.

    Raises:
        UnsupportedVersion: this vLLM lacks something that is used here.
    """

    def __init__(self, executor: Any, draft_lengths: Sequence[int], max_num_seqs: int) -> None:
        self._executor = executor
        self._runner = executor.driver_worker.worker.model_runner

    @staticmethod
    @abstractmethod
    def draft_slots(draft_lengths: Sequence[int]) -> dict[str, Any]:
        """vLLM's speculative configuration under which these numbers of drafts can be verified."""

    @property
    def device(self) -> torch.device:
        return torch.device(self._runner.device)

    @property
    def model(self) -> nn.Module:
        """The model, with weights as vLLM holds them."""
        return self._runner.get_model()  # type: ignore[no-any-return]

    def empty_logits(self) -> Tensor:
        """One row as wide as the model's logits and of their type, of no particular numbers."""
        config = self._runner.model_config
        return torch.empty((1, config.get_vocab_size()), dtype=config.dtype, device=self.device)

    @property
    @abstractmethod
    def logits_RV(self) -> Tensor:
        """The logits of the step that was executed last, until it is sampled."""

    @abstractmethod
    def hidden_states(self, key: str) -> tuple[int, Tensor]:
        """What the step that was executed last computed of a request that it scheduled, until it is sampled.

        Returns:
            The position of the first of Q tokens, and the last layer's output [Q, H] at all of them.
        """

    @abstractmethod
    def execute(self, step: ScheduledStep, tokens: DeviceTokens | None) -> ExecutedStep:
        """Enqueues a forward pass, without waiting for it.

        Args:
            tokens: input tokens whose ids are not on the host yet.
        """

    @abstractmethod
    def sample(self, step: ExecutedStep, tokens: Mapping[str, Sequence[int]]) -> Any:
        """Takes the tokens of a step that computed some; a ready request without tokens gets none.

        Returns:
            vLLM's ModelRunnerOutput.
        """

    @abstractmethod
    def replace_placeholders(self, tokens: Mapping[str, Sequence[int]], count: int) -> None:
        """Writes each request's tokens in the place of its last `count` placeholders."""


def padded(ids_R: Sequence[Sequence[int]], padding: int) -> NDArray[np.int32]:
    """Ids of R requests as rows of one length, at least 1."""
    width = max([1, *map(len, ids_R)])
    rows = [[*ids, *[padding] * (width - len(ids))] for ids in ids_R]
    return np.array(rows, dtype=np.int32).reshape(-1, width)

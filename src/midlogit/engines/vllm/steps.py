"""One step of an engine core, as a value that goes from method to method of `Core`; knows no request and no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A step that the scheduler has made.

    Attributes:
        scheduler_output: vLLM's SchedulerOutput.
        num_drafts: draft slots per request.
    """

    scheduler_output: Any
    num_drafts: int

    @property
    def is_decode(self) -> bool:
        """Whether the step computes one token and its drafts for each of its requests."""
        length = 1 + self.num_drafts
        return all(n == length for n in self.scheduler_output.num_scheduled_tokens.values())


@dataclass(frozen=True, slots=True)
class ExecutedStep:
    """A step whose forward pass is enqueued.

    Attributes:
        runner_output: vLLM's ModelRunnerOutput, where the step scheduled no token; otherwise None until it is sampled.
        rows: the first row of logits of each ready request, one whose tokens are all computed except the next; the
            rows after its drafts follow that one.
    """

    scheduled: ScheduledStep
    runner_output: Any
    rows: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SampledStep:
    """A step whose tokens the model runner has, but the scheduler has not.

    Attributes:
        runner_output: vLLM's ModelRunnerOutput.
    """

    scheduled: ScheduledStep
    runner_output: Any

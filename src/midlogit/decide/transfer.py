"""Copies between host and device without waiting; knows streams and events, not what the numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class HostCopy:
    """A small tensor on its way to the host; the copy is enqueued after the work that its stream has."""

    def __init__(self, source: Tensor) -> None:
        self._copy = source
        self._event: torch.cuda.Event | None = None
        self._values: list[Any] | None = None
        if source.device.type == "cuda":
            self._copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._copy.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(source.device))

    def values(self) -> list[Any]:
        """Its numbers as `Tensor.tolist` gives them; waits for the device once."""
        if self._values is None:
            self._wait()
            self._values = self._copy.tolist()
        return self._values

    def array(self) -> np.ndarray:
        """Its numbers, in the memory that they were copied to; waits for the device."""
        self._wait()
        return self._copy.numpy()

    def _wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def to_device(
    numbers: Tensor | Sequence[int] | Sequence[Sequence[float]],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Copies numbers of the host to a device without waiting for it.

    Args:
        numbers: a tensor keeps its own dtype.
    """
    pinned = device.type == "cuda"
    if not isinstance(numbers, Tensor):
        numbers = torch.tensor(numbers, dtype=dtype, pin_memory=pinned)
    elif pinned:
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)

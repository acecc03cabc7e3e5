"""A tensor on its way to main memory; knows events and streams, not what the numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A small tensor that is copied to main memory behind what its stream has to do, without waiting for it."""

    def __init__(self, there: torch.Tensor) -> None:
        self._here = there
        self._event: torch.cuda.Event | None = None
        self._numbers: list[Any] | None = None
        if there.device.type == "cuda":
            self._here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
            self._here.copy_(there, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def values(self) -> list[Any]:
        """Its numbers, as `Tensor.tolist` gives them; waits for the device once."""
        if self._numbers is None:
            if self._event is not None:
                self._event.synchronize()
            self._numbers = self._here.tolist()
        return self._numbers


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Copies numbers to a device without waiting for it."""
    there = torch.tensor(numbers, pin_memory=device.type == "cuda")
    return there.to(device, non_blocking=True)

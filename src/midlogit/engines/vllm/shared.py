"""Named tensors that rank 0 has, on their way to the other ranks; knows torch's process group, no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class SharedTensors:
    """Named tensors that go to all ranks, through main memory, while all of them read them.

    Without the values it is sent to the other ranks beforehand.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]]) -> None:
        self._named = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in named]
        self._values: list[Tensor | None] = [tensor for _, tensor in named]

    def __getstate__(self) -> Any:
        return self._named

    def __setstate__(self, named: Any) -> None:
        self._named, self._values = named, [None] * len(named)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        from vllm.distributed.parallel_state import get_world_group

        group = get_world_group().cpu_group
        for (name, shape, dtype), value in zip(self._named, self._values, strict=True):
            tensor = torch.empty(shape, dtype=dtype) if value is None else value.detach().cpu()
            tensor = tensor.contiguous()
            torch.distributed.broadcast(tensor.view(-1).view(torch.uint8), src=0, group=group)
            yield name, tensor

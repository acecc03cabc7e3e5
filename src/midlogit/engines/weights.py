"""New weights by name: checks them in full against what a model takes, before any is written; knows no engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from midlogit.engines.base import Weights
from midlogit.engines.layout import STAYS, Layout
from midlogit.errors import WeightMismatch, first_line

NamedTensors = Iterable[tuple[str, Tensor]]  # that can be read more than once


class SafetensorsFolder:
    """The tensors of a folder's safetensors files, read anew each time.

    Raises:
        WeightMismatch: no such file, or one that is torn.
    """

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.safetensors"))
        if not self._files:
            raise WeightMismatch(f"{folder} holds no safetensors file.", STAYS)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for file in self._files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  # it is no mapping
                        yield name, opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise WeightMismatch(
                    f"{file} cannot be read: {first_line(error)}.", STAYS
                ) from error


def check_weights(weights: Weights, layout: Layout) -> NamedTensors:
    """Checks every name, shape, dtype and value; writes nothing.

    Args:
        weights: an iterable is read once, and its tensors are kept until they are written.

    Returns:
        The weights, which can be read again.

    Raises:
        WeightMismatch: says which tensor does not fit, and how.
    """
    named = SafetensorsFolder(weights) if isinstance(weights, Path) else _as_named(weights)
    names: set[str] = set()
    finite: dict[str, Tensor] = {}
    for name, tensor in named:
        layout.require_known(name, tuple(tensor.shape))
        if name in names:
            raise WeightMismatch(f"{name} comes twice.", STAYS)
        if not tensor.is_floating_point():
            raise WeightMismatch(f"{name} holds {tensor.dtype}, no floating numbers.", STAYS)
        names.add(name)
        finite[name] = torch.isfinite(tensor).all()

    layout.require_complete(names)
    # On a GPU the answers are waited for once: by then the tensors themselves are computed as well.
    for name, is_finite in zip(finite, _values(list(finite.values())), strict=True):
        if not is_finite:
            raise WeightMismatch(f"{name} holds NaN or infinite values.", STAYS)
    return named


def _as_named(weights: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    named = list(weights)
    for pair in named:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], Tensor):
            raise WeightMismatch(
                f"Weights hold {type(pair).__name__}.", "Give (name, tensor) pairs, or a Path."
            )
    return named


def _values(flags: list[Tensor]) -> list[Any]:
    """The values of flags on any devices."""
    if len({flag.device for flag in flags}) == 1:
        values: list[Any] = torch.stack(flags).tolist()
        return values
    return [flag.item() for flag in flags]


def write_weights(named: NamedTensors, module: torch.nn.Module) -> None:
    """Copies checked weights into a module, in place; a tied weight is taken from the one name that is kept."""
    state = module.state_dict()
    kept = {state[name].data_ptr(): name for name, _ in module.named_parameters()}
    with torch.no_grad():
        for name, tensor in named:
            if kept.get(state[name].data_ptr(), name) == name:
                state[name].copy_(tensor)


def are_finite(weights: Iterable[Tensor]) -> bool:
    """Whether no weight is NaN or infinite; formats of fewer than 16 bits are not looked at."""
    flags = [
        torch.isfinite(weight).all()
        for weight in weights
        if weight.is_floating_point() and weight.element_size() > 1
    ]
    return all(_values(flags))


def checksum(weights: Iterable[Tensor]) -> int:
    """The sum of the bits of weights, each number's as an integer of its size."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sum(
        int(weight.detach().view(integers[weight.element_size()]).sum(dtype=torch.int64))
        for weight in weights
    )


def shares_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether a weight of one module is a weight of the other."""
    return not set(one.parameters()).isdisjoint(other.parameters())

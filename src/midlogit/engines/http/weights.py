"""Checks new weights before servers take them, by the files on this machine; knows files and numpy, no server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

from midlogit.engines.layout import STAYS, Layout
from midlogit.errors import WeightMismatch, first_line

EXPONENT = 0x7F80  # of bfloat16: all ones for infinity and NaN
NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class StoredTensor(NamedTuple):
    """Where a tensor lies: from byte `begin` of a file on."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int


def layout_of(served: Path) -> Layout | None:
    """The tensors of the model that a server was started with; None where its files are not on this machine."""
    shapes = {name: tensor.shape for name, tensor in _stored(served)}
    if not shapes:
        return None
    optional = frozenset() if HEAD in shapes else frozenset({HEAD})
    return Layout({HEAD: shapes.get(EMBEDDING, ()), **shapes}, optional)


def check_folder(folder: Path, layout: Layout | None) -> None:
    """Checks the files of new weights in full.

    Args:
        layout: what the servers' model takes; None for no check of names and shapes.

    Raises:
        WeightMismatch: says what does not fit.
    """
    tensors = dict(_stored(folder))
    if not tensors:
        raise WeightMismatch(f"{folder} holds no safetensors file.", STAYS)

    if layout is not None:
        for name, tensor in tensors.items():
            layout.require_known(name, tensor.shape)
        layout.require_complete(tensors)

    for name, tensor in tensors.items():
        if tensor.dtype not in NUMBERS:
            raise WeightMismatch(f"{name} holds {tensor.dtype}, no floating numbers.", STAYS)
        if not _is_finite(tensor):
            raise WeightMismatch(f"{name} holds NaN or infinite values.", STAYS)


def _stored(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a folder's files, by their headers."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as opened:
                header_bytes = int.from_bytes(opened.read(8), "little")
                header = orjson.loads(opened.read(header_bytes))
            header.pop("__metadata__", None)
            start = 8 + header_bytes
            end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightMismatch(f"{file} cannot be read: {first_line(error)}.", STAYS) from error
        if file.stat().st_size != end:
            raise WeightMismatch(
                f"{file} cannot be read: it has {file.stat().st_size} bytes, its header says {end}.",
                STAYS,
            )
        for name, entry in header.items():
            begin = start + entry["data_offsets"][0]
            yield name, StoredTensor(entry["dtype"], tuple(entry["shape"]), file, begin)


def _is_finite(tensor: StoredTensor) -> bool:
    count = int(np.prod(tensor.shape, dtype=np.int64))
    numbers = np.fromfile(tensor.file, NUMBERS[tensor.dtype], count, offset=tensor.begin)
    if tensor.dtype == "BF16":
        return not bool(((numbers & EXPONENT) == EXPONENT).any())
    return bool(np.isfinite(numbers).all())

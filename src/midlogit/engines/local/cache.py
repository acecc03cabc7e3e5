"""A KV cache with one slot per sequence, where rows join, leave and write at their own positions.

Knows transformers' cache seam; not which tokens are in it. Slot b holds a sequence's keys in columns
0 … length_b − 1, so a row's column is its position, joining moves no other row, and
rolling back is forgetting the length. Columns beyond a sequence's length are zero, or of tokens rolled back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

COLUMN_BLOCK = 64


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, [slots, heads, columns, head_dim]; where to write is its cache's."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            torch.zeros(
                (self.cache.slots, x.shape[1], self.cache.columns, x.shape[3]),
                dtype=x.dtype,
                device=x.device,
            )
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes the new tokens' states, [rows, heads, q, head_dim], and returns all that the rows may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if (self.keys.dtype, self.values.dtype) != (key_states.dtype, value_states.dtype):
            # Autocast came on or went off; under it keys may be float32 and values bfloat16.
            self.keys = self.keys.to(key_states.dtype)
            self.values = self.values.to(value_states.dtype)
        cache = self.cache
        row_M, q_M, slot_M, column_M = cache.writes
        self.keys[slot_M, :, column_M] = key_states[row_M, :, q_M]
        self.values[slot_M, :, column_M] = value_states[row_M, :, q_M]
        return self.keys[cache.view, :, : cache.width], self.values[cache.view, :, : cache.width]

    def resize(self, slots: int, columns: int) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = (
            torch.nn.functional.pad(x, (0, 0, 0, columns - x.shape[2], 0, 0, 0, slots - x.shape[0]))
            for x in (self.keys, self.values)
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_seq_length(self) -> int:
        return self.cache.width

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):  # type: ignore[misc]
    """The cache of one model; grows by doubling slots and in blocks of columns.

    Attributes:
        slots, columns: allocated. view: the slots of the current forward. width: columns it attends to.
        writes: (row, query, slot, column) of every state that the current forward writes, four [M] tensors.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])
        self.slots = 1
        self.columns = COLUMN_BLOCK
        self.view = slice(0, 0)
        self.width = 0
        self.writes: tuple[Tensor, Tensor, Tensor, Tensor]

    def reserve(self, slots: int, columns: int) -> None:
        """Makes room for this many slots and columns."""
        if slots <= self.slots and columns <= self.columns:
            return
        while self.slots < slots:
            self.slots *= 2
        self.columns = max(self.columns, -(-columns // COLUMN_BLOCK) * COLUMN_BLOCK)
        for layer in self.layers:
            layer.resize(self.slots, self.columns)

    def copy(self, source: int, target: int, columns: int) -> None:
        """Copies a slot's first columns into another slot."""
        for states in self._states():
            states[target, :, :columns] = states[source, :, :columns]

    def clear(self, slot: int, columns: int) -> None:
        """Zeroes a slot, so that nothing of a sequence, NaN least of all, reaches the slot's next one.

        A masked column has weight 0, and 0 · NaN is NaN.
        """
        for states in self._states():
            states[slot, :, :columns] = 0

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of the keys and values: of the last forward, whatever autocast made of them."""
        return {x.dtype for x in self._states()}

    @property
    def num_bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(x.numel() * x.element_size() for x in self._states())

    def _states(self) -> list[Tensor]:
        return [
            x for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values)
        ]

"""Keys and values of a transformers cache that grow in place.

Letters: **G** heads of keys and values, **C** numbers per head, **T** cached tokens.
`DynamicLayer.update` copies the whole cache for every token. Here a layer's `keys` and `values` become views of larger
memory, into which the next token is written. Everything else that uses the cache sees tensors as before. Tokens once
written are never overwritten: whatever changes a layer otherwise (cropping, reordering, a copy that goes its own way)
gets new memory first.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ATTRIBUTE = "_mixoff_growing"
SPARE, LEAST = 8, 64  # new memory is larger by one part in SPARE, by at least LEAST tokens


class Growing:
    """Memory (1, G, room, C) each for the keys and values of one cache layer: tokens start..used of it are its own."""

    def __init__(self, layer: Any) -> None:
        tokens = layer.keys.shape[2]
        self.room, self.start, self.used = tokens + max(tokens // SPARE, LEAST), 0, tokens
        self.window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else 0
        self.keys, self.values = (self._moved(old) for old in (layer.keys, layer.values))
        self._show(layer)

    def _moved(self, old: torch.Tensor) -> torch.Tensor:
        _, G, T, C = old.shape
        new = old.new_empty(1, G, self.room, C)
        new[:, :, :T] = old
        return new

    def _show(self, layer: Any) -> None:
        size = self.used - self.start
        layer.keys = self.shown_keys = self.keys.narrow(2, self.start, size)
        layer.values = self.shown_values = self.values.narrow(2, self.start, size)

    def holds(self, layer: Any) -> bool:
        """Whether the layer still shows what this memory gave it, with room for one more token."""
        return layer.keys is self.shown_keys and layer.values is self.shown_values and self.used < self.room

    def places(self) -> tuple[int, int, int, int]:
        """Addresses of the first key and value that the next token sees, the room per head, and how many it sees."""
        return self.shown_keys.data_ptr(), self.shown_values.data_ptr(), self.room, self.used - self.start

    def add(self, layer: Any) -> None:
        """Show one more token, which was written after the last."""
        self.used += 1
        if self.window:
            self.start = max(self.start, self.used - self.window + 1)  # as transformers: one fewer than the window
            layer.cumulative_length += 1
        self._show(layer)


def growing(layer: Any, dtype: torch.dtype) -> Growing | None:
    """The memory of a cache layer that holds one sequence in this dtype; None for a layer of another kind."""
    memory = vars(layer).get(ATTRIBUTE)
    if memory is not None and memory.holds(layer):
        return memory if memory.keys.dtype == dtype else None
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
        return None
    keys, values = layer.keys, layer.values
    if keys.dim() != 4 or keys.shape != values.shape or keys.shape[0] != 1 or keys.shape[2] == 0:
        return None
    if not keys.dtype == values.dtype == dtype or not keys.is_cpu or getattr(layer, "record_past", False):
        return None
    memory = vars(layer)[ATTRIBUTE] = Growing(layer)
    return memory

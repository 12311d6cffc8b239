"""KV caches of transformers whose rows come and go.

Only caches that hold keys and values of all tokens can be joined.

Letters: **B** rows, **T** tokens, padding included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer


def joinable(cache: Any) -> bool:
    """Whether every layer of `cache` holds keys and values (B, heads, T, width) and nothing else."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def select(cache: Any, keep: list[int]) -> bool:
    """Keep these rows of `cache` only; False if it is of a family's own kind, and was left alone."""
    if type(cache) is not DynamicCache:
        return False
    cache.reorder_cache(torch.tensor(keep))
    return True


def merge(into: Any, other: Any, mask: torch.Tensor, other_mask: torch.Tensor) -> torch.Tensor:
    """Append the rows of cache `other` to `into`, padded on the left to the longer one; returns the mask of all rows.

    Both caches are `joinable`. masks: 1 for a token, 0 for padding, (B, T).
    """
    width = max(mask.shape[1], other_mask.shape[1])
    for layer, more in zip(into.layers, other.layers, strict=True):
        if layer.is_initialized:
            layer.keys = torch.cat([_widened(layer.keys, width), _widened(more.keys, width)])
            layer.values = torch.cat([_widened(layer.values, width), _widened(more.values, width)])
    return torch.cat([pad(m, (width - m.shape[1], 0)) for m in (mask, other_mask)])


def _widened(t: torch.Tensor, width: int) -> torch.Tensor:
    return pad(t, (0, 0, width - t.shape[-2], 0))


def trim(cache: Any, mask: torch.Tensor) -> torch.Tensor:
    """Drop the columns at the left that are padding in every row; returns the mask (B, T) that is left."""
    first = int(mask.any(0).int().argmax())
    if first == 0 or not joinable(cache):
        return mask
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., first:, :], layer.values[..., first:, :]
    return mask[:, first:]

"""The cache of keys and values: one pass over it, and its bytes per token, from a rehearsal without memory."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixoff.shapes import sites
from mixoff.shapes.config import dtype_name, expert_modules

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PretrainedConfig, PreTrainedModel


CACHE_NAMES = ("cache", "past_key_values")  # what transformers calls a pass's keys and values: since 5.24, and before
REHEARSED = 97  # tokens of the rehearsal: a prime that is no width of any layer, so it marks the dimension of tokens


@dataclass(frozen=True)
class CacheLayer:
    """One tensor of the KV cache of one sequence: bytes that are fixed, bytes a token, and the tokens it keeps."""

    fixed: int
    per_token: int
    window: int | None

    def nbytes(self, context: int) -> int:
        """Bytes after `context` tokens."""
        return self.fixed + self.per_token * min(context, self.window or context)


# The rehearsal --------------------------------------------------------------------------------------------------------


def rehearse(skeleton: PreTrainedModel) -> tuple[dict[str, int], tuple[CacheLayer, ...]]:
    """Experts a token of each site, by name, and the tensors of the KV cache, from one forward pass on the meta device.

    A model that cannot be rehearsed (its forward looks at values) gets neither experts a token nor a rehearsed cache:
    the configuration has to do. The skeleton's experts compute nothing afterwards.
    """
    import torch

    chosen: dict[str, int] = {}
    for name, module in expert_modules(skeleton).items():
        module.forward = _absent(name, chosen)
    try:
        with torch.no_grad():
            ids = torch.zeros(1, REHEARSED, dtype=torch.long, device="meta")
            _, cache = advance(skeleton, ids)
    except Exception:  # any of a hundred models' forwards may fail here, in any way
        return chosen, _formula(skeleton.config)
    return chosen, tuple(_measured(cache))


def _absent(name: str, chosen: dict[str, int]) -> object:
    """Stands in for the experts' forward: notes K of the choice (T, K), returns zeros (T, D)."""

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, *_: object) -> torch.Tensor:
        chosen[name] = top_k_index.shape[-1]
        return hidden_states.new_zeros(hidden_states.shape)

    return forward


def _measured(cache: object) -> Iterator[CacheLayer]:
    for tensor, window in _tensors(cache, None, set()):
        nbytes = tensor.numel() * tensor.element_size()
        if REHEARSED in tensor.shape:
            yield CacheLayer(0, nbytes // REHEARSED, window)
        elif window in tensor.shape:
            yield CacheLayer(0, nbytes // window, window)
        else:
            yield CacheLayer(nbytes, 0, None)


def _tensors(thing: object, window: int | None, seen: set[int]) -> Iterator[tuple[torch.Tensor, int | None]]:
    """Every tensor that a cache holds, however its class nests them, with the tokens that its layer keeps."""
    import torch

    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing, window
    elif isinstance(thing, (list, tuple, dict)):
        for item in thing.values() if isinstance(thing, dict) else thing:
            yield from _tensors(item, window, seen)
    elif hasattr(thing, "__dict__") and type(thing).__module__.startswith("transformers"):
        size = getattr(thing, "sliding_window", None)
        yield from _tensors(vars(thing), size - 1 if size else window, seen)


def cache_nbytes(cache: object) -> int:
    """Bytes of all tensors that one of transformers' caches holds."""
    return sum(tensor.numel() * tensor.element_size() for tensor, _ in _tensors(cache, None, set()))


def _formula(config: PretrainedConfig) -> tuple[CacheLayer, ...]:
    """Keys and values of every layer: what a model has that is neither compressed nor windowed."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    item = sites.dtype_nbytes(dtype_name(config))
    return tuple(CacheLayer(0, 2 * heads * width * item, None) for _ in range(text.num_hidden_layers))


def advance(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None = None, **how: object
) -> tuple[torch.Tensor, Cache]:
    """One pass over ids (B, T), after what `cache` holds: logits (B, T, V), and the cache, which holds them too now.

    how: what else `model` takes. Written for every transformers, which has two names for that cache.
    """
    name = _cache_name(type(model))
    out = model(ids, use_cache=True, **{name: cache}, **how)
    return out.logits, out[name]


@functools.cache
def _cache_name(model: type[PreTrainedModel]) -> str:
    pass  # which imports torch

    return next(name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters)

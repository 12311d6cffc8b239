"""The cache of keys and values: one forward pass with it, and its bytes per token, from a pass without memory."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixoff.errors import MixoffError
from mixoff.shapes import sites
from mixoff.shapes.config import dtype_name, expert_modules

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PretrainedConfig, PreTrainedModel


CACHE_NAMES = ("cache", "past_key_values")  # transformers' argument for keys and values: since 5.24, and before
BITS = (4, 8)  # of a quantized cache
RESIDUAL = 128  # newest tokens, at most, that a quantized cache of transformers keeps as they are
GROUP = 64  # values that share a scale and a zero point, at most
COPIES = 2  # of one layer's keys and values while attention reads them: unpacked, and with the newest tokens appended
REHEARSED = 97  # tokens of the rehearsal: a prime that is not a width of any layer, so it marks the dimension of tokens


@dataclass(frozen=True)
class CacheLayer:
    """One tensor of the KV cache of one sequence.

    - fixed: bytes that do not depend on the number of tokens.
    - per_token: bytes per token.
    - window: most tokens that it keeps; None keeps all.
    """

    fixed: int
    per_token: int
    window: int | None

    def nbytes(self, context: int) -> int:
        """Bytes after `context` tokens."""
        return self.fixed + self.per_token * min(context, self.window or context)


# The rehearsal --------------------------------------------------------------------------------------------------------


def rehearse(skeleton: PreTrainedModel) -> tuple[dict[str, int], tuple[CacheLayer, ...]]:
    """Experts per token by site, and the tensors of the KV cache, from one forward pass on the meta device.

    Some models cannot be rehearsed, because their forward depends on values. For these no site is returned, and the
    cache follows from the configuration. The skeleton's experts are replaced, and compute nothing afterwards.
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
    """A replacement for the experts' forward: notes K of the choice (T, K), returns zeros (T, D)."""

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
    """Every tensor in a cache, however its class nests them, with the window of its layer."""
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


def _formula(config: PretrainedConfig) -> tuple[CacheLayer, ...]:
    """Keys and values of every layer, for a model that neither compresses nor windows them."""
    heads, width = _heads(config)
    item = sites.dtype_nbytes(dtype_name(config))
    layers = config.get_text_config().num_hidden_layers
    return tuple(CacheLayer(0, 2 * heads * width * item, None) for _ in range(layers))


def quantized(cache: tuple[CacheLayer, ...], config: PretrainedConfig, bits: int) -> tuple[CacheLayer, ...]:
    """The cache with keys and values in `bits`, as transformers' quantized cache keeps them, and its working copy.

    Raises MixoffError for other bits, and for a cache that is more than keys and values of every token.
    """
    if bits not in BITS:
        raise MixoffError(f"kv_bits is {bits}: choose one of {', '.join(map(str, BITS))}, or leave it out for 16")
    text, item = config.get_text_config(), sites.dtype_nbytes(dtype_name(config))
    heads, width = _heads(config)
    plain = getattr(text, "num_hidden_layers", 0) * (CacheLayer(0, 2 * heads * width * item, None),)
    tokens = sum(layer.per_token for layer in cache)
    if any(layer.fixed or layer.window for layer in cache) or tokens != sum(layer.per_token for layer in plain):
        raise MixoffError(
            "kv_bits suits a cache of keys and values of every token, and this model keeps states, windows or "
            "compressed keys: leave kv_bits out"
        )
    values = tokens // item
    packed = values * bits // 8 + 2 * (values // group_size(heads, width)) * item
    working = COPIES * plain[0].per_token
    return (CacheLayer(RESIDUAL * tokens, packed, None), CacheLayer(0, working, None))


def cache_options(config: PretrainedConfig, bits: int) -> dict[str, object]:
    """Arguments of transformers' `QuantizedCache`. Groups run along a head's width, so each token has its own."""
    size = group_size(*_heads(config))
    return {
        "backend": "hqq", "nbits": bits, "axis_key": 1, "axis_value": 1, "q_group_size": size,
        "residual_length": RESIDUAL,
    }  # fmt: skip


def group_size(heads: int, width: int) -> int:
    """The largest group, up to GROUP, that divides a head's width and makes an even number of groups per token.

    hqq packs two halves of the groups into one byte.

    >>> group_size(8, 128), group_size(2, 48), group_size(1, 64), group_size(4, 80)
    (64, 48, 32, 40)
    """
    fitting = (g for g in range(GROUP, 0, -1) if width % g == 0 and heads * (width // g) % 2 == 0)
    if (size := next(fitting, None)) is None:
        raise MixoffError(f"kv_bits cannot pack {heads} head of width {width}: leave kv_bits out")
    return size


def _heads(config: PretrainedConfig) -> tuple[int, int]:
    """Heads of keys and values, and their width."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def advance(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None = None, **options: object
) -> tuple[torch.Tensor, Cache]:
    """One forward pass: logits (B, T, V), and the cache with the new tokens.

    - ids: tokens (B, T), which follow those in `cache`.
    - cache: cache of earlier passes; None starts a sequence.
    - options: further arguments of `model`.

    The name of the cache's argument depends on the version of transformers.
    """
    name = _cache_name(model.__class__)
    out = model(ids, use_cache=True, **{name: cache}, **options)
    return out.logits, out[name]


def begin(model: PreTrainedModel, length: int) -> Cache | None:
    """An empty static cache for one sequence of `length` tokens, where the runtime wants one; else None."""
    if getattr(getattr(getattr(model, "mixoff", None), "step", None), "cache", None) != "static":
        return None
    from transformers import StaticCache

    return StaticCache(model.config, max_cache_len=length)


@functools.cache
def _cache_name(model: type[PreTrainedModel]) -> str:
    return next(name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters)

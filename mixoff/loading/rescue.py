"""Out of memory during a pass: free slots, cut the KV cache back to where the pass began, and repeat the pass.

If a model's cache cannot be cut back (sliding window, recurrent state), the pass ends with an error that gives figures
and advice. The next call then has the freed memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from mixoff.errors import BudgetError
from mixoff.loading.passes import wrap
from mixoff.pages import out_of_memory
from mixoff.shapes.kv_cache import CACHE_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mixoff.runtime.runtime import Runtime


def guard(model: PreTrainedModel, runtime: Runtime) -> ExitStack:
    """Let passes of `model` survive running out of memory, at the cost of slots; closing the result ends that."""
    signature = inspect.signature(model.forward)

    def around(forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        bound = signature.bind_partial(*args, **kwargs)
        given = bound.arguments | bound.kwargs
        cache: Any = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None  # other caches have no length
        length = length.clone() if isinstance(length, torch.Tensor) else length  # a static cache counts in place
        while (done := _attempt(lambda: forward(*args, **kwargs)))[1] is not None:
            runtime.make_room(done[1])
            _cut_back(cache, length)
        return done[0]

    undo = ExitStack()
    undo.callback(wrap(model, around))
    return undo


def _attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """(Result of `work`, None), or (None, what ran out of memory); the error is gone then, and the tensors it held."""
    try:
        return work(), None
    except Exception as error:
        if (why := out_of_memory(error)) is None:
            raise
        return None, why


def _cut_back(cache: object, length: int | torch.Tensor | None) -> None:
    """Drop what the failed pass added to the cache. Raises BudgetError for a cache that cannot be cut back."""
    if cache is None:
        return
    from transformers.cache_utils import DynamicLayer, StaticLayer

    layers = getattr(cache, "layers", None)
    if layers is None or any(type(layer) not in (DynamicLayer, StaticLayer) for layer in layers):
        where = "" if length is None else f" at token {length}"
        raise BudgetError(
            f"memory ran out{where}, and this model's cache ({type(cache).__name__}) cannot be cut back to "
            "repeat the pass; slots were freed meanwhile, so generate again, with a shorter context or fewer bits"
        )
    for layer in layers:  # the meaning of `crop` differs between versions of transformers
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.copy_(torch.as_tensor(length))  # what is beyond will be written again
        elif layer.is_initialized:
            layer.keys, layer.values = (_first(t, length) for t in (layer.keys, layer.values))


def _first(t: torch.Tensor, length: int | None) -> torch.Tensor:
    """The first entries of keys or values (..., length, width); zero of them take no memory."""
    return t[..., :length, :] if length and t.numel() else t.new_empty(0)

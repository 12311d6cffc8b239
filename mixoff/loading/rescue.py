"""When memory runs out in the middle of a pass: slots are given back, the cache of keys and values is cut back to where
the pass began, and the pass is repeated.

A model whose cache cannot be cut back (a sliding window, a state) ends with the figures and the advice instead; the
next call finds the room that was made. Does not know how experts are cached or computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from mixoff.errors import BudgetError
from mixoff.loading.passes import wrap
from mixoff.pages import out_of_memory
from mixoff.shapes.kv_cache import CACHE_NAMES

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from mixoff.runtime.runtime import Runtime


def guard(model: PreTrainedModel, runtime: Runtime) -> ExitStack:
    """Let passes of `model` survive a lack of memory, at the cost of slots; closing what is returned ends that."""
    signature = inspect.signature(model.forward)

    def around(forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        given = signature.bind_partial(*args, **kwargs)
        given = given.arguments | given.kwargs
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None  # other kinds of cache have none
        while (done := _attempt(lambda: forward(*args, **kwargs)))[1] is not None:
            runtime.make_room(done[1])
            _cut_back(cache, length)
        return done[0]

    undo = ExitStack()
    undo.callback(wrap(model, around))
    return undo


def _attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `work` returns, or what it lacked memory for; its tensors are gone then, as is the error that held them."""
    try:
        return work(), None
    except Exception as error:
        if (why := out_of_memory(error)) is None:
            raise
        return None, why


def _cut_back(cache: object, length: int | None) -> None:
    """Drop what a pass that failed has added. Raises BudgetError for a cache of which that cannot be taken away."""
    if cache is None:
        return
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        where = "" if length is None else f" at token {length}"
        raise BudgetError(
            f"memory ran out{where}, and this model's cache ({type(cache).__name__}) cannot be cut back to "
            "repeat the pass; slots were given back meanwhile, so generate again, with a shorter context or fewer bits"
        )
    for layer in cache.layers:  # `crop` means other things in other versions of transformers
        if layer.is_initialized:
            layer.keys, layer.values = (_first(t, length) for t in (layer.keys, layer.values))


def _first(t: Tensor, length: int) -> Tensor:
    """The first entries of keys or values (..., length, width); none of them hold no memory."""
    return t[..., :length, :] if length and t.numel() else t.new_empty(0)

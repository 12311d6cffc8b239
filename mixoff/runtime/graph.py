"""A token of a resident model as one CUDA graph: captured once for each static cache of keys and values, then replayed.

Queueing a token's launches takes the host longer than most cards take to compute them. A graph holds all of them with
their addresses and is queued by one call, so bits are those of the pass that was captured. That needs the same shapes,
the same addresses and no look of the host at the card from one token to the next:

- keys and values in transformers' static cache, which grows in place and keeps its length on the card,
- every expert in a slot to stay, found by a table on the card (`resident`),
- a token's inputs copied into tensors that belong to the graph.

A cache's first token is computed as ever, while `Looks` notes what would make the host wait. If there was nothing, the
second is captured; later ones are replayed. Whatever differs from what was captured is computed as ever: prompts,
batches, other arguments, hooks, listeners, slots that changed.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.cache_utils import StaticCache, StaticLayer

from mixoff.runtime.runtime import Runtime
from mixoff.runtime.watched import Watched
from mixoff.shapes.kv_cache import CACHE_NAMES

PLAIN = (type(None), bool, int, float, str)  # arguments that are compared by value
aten = torch.ops.aten
# calls whose result has a size that depends on values, or that hand a value to the host
LOOKING = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.repeat_interleave)


class Looks(TorchDispatchMode):
    """Notes calls of ATen for which the host waits for a device; a capture would fail at each. found: their names."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if looks(func, (args, kwargs), out):
            self.found.append(func.overloadpacket.__name__)
        return out


def looks(func: Any, given: Any, out: Any) -> bool:
    """Whether a call of ATen makes the host wait: for a value, for a size, or for a copy between devices."""
    name = func.overloadpacket
    if name in LOOKING:
        return True
    tensors = [t for t in tree_flatten((given, out))[0] if isinstance(t, torch.Tensor)]
    indexing = name in (aten.index, aten.index_put, aten.index_put_)
    masks = indexing and any(
        t.dtype in (torch.bool, torch.uint8) for t in tree_flatten(given[0][1])[0] if t is not None
    )
    return masks or len({t.device.type for t in tensors if t.dim()}) > 1


class Same:
    """An argument that equals nothing but itself, such as the tokenizer that `generate` passes on."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    __hash__ = None  # type: ignore[assignment]


@dataclass
class Pass:
    """What a pass is given, apart from its cache. form: all that must be alike for a graph to fit."""

    cache: StaticCache
    name: str  # of the cache among the arguments
    tensors: list[torch.Tensor]
    form: tuple

    def arguments(self, tensors: Iterable[torch.Tensor]) -> tuple[tuple, dict]:
        """Arguments of a pass with these tensors in place of its own."""
        spec, leaves, *_ = self.form
        given = iter(tensors)
        values = [next(given) if isinstance(leaf, tuple) else getattr(leaf, "thing", leaf) for leaf in leaves]
        args, kwargs = tree_unflatten(values, spec)
        return args, kwargs | {self.name: self.cache}


@dataclass
class Graph:
    """A captured pass.

    inputs: its tensors of a token. state: those of the cache, at their addresses. experts: the runtime's cache of
    experts that the tables are true for. replay: queues it. leaves, spec: its result. hits: experts that it computes.
    """

    form: tuple
    inputs: list[torch.Tensor]
    state: list[torch.Tensor]
    experts: object
    replay: Callable[[], None]
    leaves: list
    spec: Any
    hits: int

    def fits(self, now: Pass, runtime: Runtime) -> bool:
        """Whether this pass may be a replay."""
        same = all(a is b for a, b in zip(self.state, state_of(now.cache), strict=True))
        return same and self.form == now.form and self.experts is runtime.cache

    def run(self, now: Pass) -> Any:
        """Replay it for the tensors of this pass; the result has memory of its own."""
        for mine, given in zip(self.inputs, now.tensors, strict=True):
            mine.copy_(given)
        self.replay()
        return self.result(now.cache)

    def result(self, cache: StaticCache) -> Any:
        """The result as the model's forward pass returns it."""
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        return tree_unflatten([cache if leaf is StaticCache else leaf for leaf in leaves], self.spec)


def state_of(cache: StaticCache) -> list[torch.Tensor]:
    """Keys, values and length of every layer."""
    return [t for layer in cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]


class Graphs:
    """The graphs of one model, one per cache. why: why there is none, in words.

    cache: transformers' name of the cache that they need. Whether there are graphs or not, it is the same one, so that
    the same sums are made in any budget.
    """

    cache = "static"

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self.runtime, self.why = runtime, ""
        self.backbone = getattr(model, "base_model", model)
        self.watched = Watched([model])
        # by cache: the form of the pass that warmed up, or the graph; neither holds the cache
        self.known: weakref.WeakKeyDictionary[StaticCache, tuple | Graph] = weakref.WeakKeyDictionary()

    def info(self) -> str:
        """In words, what computes single tokens."""
        if self.why:
            return f"modules: {self.why}"
        captured = any(isinstance(known, Graph) for known in self.known.values())
        return "one graph per token" if captured else "modules; one graph per token with a static cache"

    def around(self, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Replaces the model's forward pass."""
        now = None if self.why else self._seen(args, kwargs)
        if now is None:
            return forward(*args, **kwargs)
        known = self.known.get(now.cache)
        if isinstance(known, Graph):
            if (out := self._replayed(known, now)) is not None:
                return out
            self.known.pop(now.cache)
        elif known == now.form and (out := self._captured(forward, now)) is not None:
            return out
        return self._warmed(forward, args, kwargs, now)

    def _seen(self, args: tuple, kwargs: dict) -> Pass | None:
        """The pass, if a graph could compute it: a token of a static cache that has begun, and nobody looks inside."""
        name = next((name for name in CACHE_NAMES if isinstance(kwargs.get(name), StaticCache)), None)
        if name is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        cache: Any = kwargs[name]
        if any(type(layer) is not StaticLayer or not layer.is_initialized for layer in cache.layers):
            return None
        rest = {key: value for key, value in kwargs.items() if key != name}
        now = _pass(cache, name, args, rest)
        return now if now and self.runtime.residents.found(self.runtime) and self.watched.untouched() else None

    def _warmed(self, forward: Callable[..., Any], args: tuple, kwargs: dict, now: Pass) -> Any:
        """Compute a pass as ever, and note whether the next one like it can be captured."""
        seen = Looks()
        self.runtime._pass.served = 0
        with seen:
            out = forward(*args, **kwargs)
        if self.runtime._pass.served != len(self.runtime.source.sites):
            self.why = "experts of this form are not found by kernels"
        elif seen.found:
            self.why = f"the host waits for {', '.join(sorted(set(seen.found)))} in every token"
        else:
            self.known[now.cache] = now.form
        return out

    def _captured(self, forward: Callable[..., Any], now: Pass) -> Any:
        """Capture this pass, and replay it; None, with a warning, if the device refuses."""
        runtime, device = self.runtime, self.runtime.device
        assert device is not None  # `residents` asked
        inputs = [t.clone() for t in now.tensors]
        args, kwargs = now.arguments(inputs)
        with runtime._lock:
            hits, tokens = runtime.cache.hits, runtime._tokens
            try:
                out, replay = device.capture(lambda: forward(*args, **kwargs))
            except Exception as error:  # the driver, torch and triton raise many kinds
                runtime.cache.hits, runtime._tokens = hits, tokens
                self.why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                warnings.warn(f"tokens are computed without a CUDA graph, more slowly ({self.why})", stacklevel=2)
                return None
            leaves, spec = tree_flatten(out, is_leaf=lambda x: x is now.cache)
            leaves = [StaticCache if leaf is now.cache else leaf for leaf in leaves]
            counted = runtime.cache.hits - hits
            graph = Graph(now.form, inputs, state_of(now.cache), runtime.cache, replay, leaves, spec, counted)
            self.known[now.cache] = graph
            graph.replay()
            return graph.result(now.cache)

    def _replayed(self, graph: Graph, now: Pass) -> Any:
        """The result of a replay; None if the graph does not fit this pass."""
        runtime = self.runtime
        with runtime._lock:
            if runtime._closed or not graph.fits(now, runtime):
                return None
            runtime.begin_pass(1, 1)
            runtime.cache.hits += graph.hits
            return graph.run(now)


def _pass(cache: StaticCache, name: str, args: tuple, kwargs: dict) -> Pass | None:
    """A pass over one token; None for others."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, torch.Tensor) or ids.numel() != 1:
        return None
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    kinds = tuple(_kind(leaf) for leaf in leaves)
    modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(ids.device.type)
    return Pass(cache, name, tensors, (spec, kinds, *modes))


def _kind(leaf: Any) -> object:
    """What must be alike of an argument: of a tensor all but its values."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, PLAIN) else Same(leaf)

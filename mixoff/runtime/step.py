"""The decode step: one token through a decoder layer by two compiled calls, with the cache of experts in between.

Letters: **D** model width, **E** experts, **K** experts per token.
PyTorch takes two thirds of the time of a token for what are not products: hundreds of small operations per layer, each
of which finds its code evicted by the weights that pass through. So a layer that is built like the common decoder is
compiled as a whole. Which layers are is never decided by their names: their parts are looked for, and a layer of each
kind is computed both ways when it is first needed, and whenever the cache has doubled (`likeness`). If the results
differ, transformers' modules compute that kind from then on.

Only for models with quantized experts: others equal plain transformers bit for bit. Values between the operations of a
layer are fp32 here, and rounded to the model's dtype between layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mixoff.kernels.cpu import threads
from mixoff.kernels.cpu.program import Memory, plain, readable
from mixoff.runtime.decoder import Half, Unlike, Whole, parts_of
from mixoff.runtime.growing import Growing, growing
from mixoff.runtime.likeness import Kind, LayerCall, compare, experts_of, form_of, kind_of
from mixoff.runtime.runtime import Runtime
from mixoff.runtime.watched import Watched
from mixoff.shapes.kv_cache import CACHE_NAMES

FEW = 8  # rows of the head that are compiled: those of a small batch
NEW, OLD = CACHE_NAMES


class Step:
    """The decode step of one model, layer by layer; each thread has its own programs, since they hold addresses.

    ask: called with (site, x) for guesses of the next layer, or None
    """

    def __init__(self, model: nn.Module, runtime: Runtime, ask: Callable[[int, torch.Tensor], None] | None) -> None:
        self.model, self.runtime, self.ask = model, runtime, ask
        self.here = Here()
        self.kinds: dict[tuple, Kind] = {}
        self.layers = [Layer(self, module, i) for i, module in enumerate(_layers(model))]
        self.watched = Watched(layer.module for layer in self.layers)

    def allowed(self, ids: torch.Tensor | None, kwargs: dict[str, Any]) -> bool:
        """Whether a pass over `ids` may be computed by programs: one token, and nobody looks inside the layers."""
        if ids is None or ids.shape[0] * ids.shape[1] != 1 or ids.device.type != "cpu" or torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling() or any(kwargs.get(name) for name in kwargs if name.startswith("output_")):
            return False
        config = self.model.config
        if any(getattr(config, f"output_{name}", False) for name in ("attentions", "hidden_states", "router_logits")):
            return False
        return self.watched.untouched()

    def head(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Replaces the forward pass of a head in bf16, for few rows."""
        x, head = args[0] if args else None, self.model.get_output_embeddings()
        if x is None or x.numel() > FEW * x.shape[-1] or not x.is_cpu or torch.is_grad_enabled():
            return original(*args, **kwargs)
        return plain(x, head.weight.detach(), head.bias)

    def compiles_head(self) -> bool:
        """Whether the head is a plain linear layer in bf16."""
        head = self.model.get_output_embeddings()
        weight = head.weight if type(head) is nn.Linear else None
        return weight is not None and weight.dtype == torch.bfloat16 and readable(weight.detach())

    @contextmanager
    def passing(self, ids: torch.Tensor | None, kwargs: dict[str, Any]) -> Iterator[None]:
        """During a pass over `ids`, compute layers by programs where that is possible."""
        before, self.here.active = self.here.active, self.allowed(ids, kwargs)
        try:
            yield
        finally:
            self.here.active = before

    def info(self) -> str:
        """In words, what computes single tokens."""
        reasons = sorted({layer.reason for layer in self.layers if layer.reason})
        count = sum(not layer.reason for layer in self.layers)
        return f"compiled in {count} of {len(self.layers)} layers" + "".join(f"; {reason}" for reason in reasons)


class Here(threading.local):
    """What a thread has: whether a pass is on, memory, programs by layer, and tables of positions."""

    def __init__(self) -> None:
        self.active = False
        self.memory = Memory()
        self.programs: dict[int, tuple[tuple, Half]] = {}
        self.tables: tuple[Any, torch.Tensor, torch.Tensor] | None = None
        self.mask: tuple[Any, bool] = None, False

    def masks(self, kwargs: dict[str, Any]) -> bool:
        """Whether the pass hides any token from this one; its mask is looked at once."""
        mask = kwargs.get("attention_mask")
        if mask is not self.mask[0]:
            hides = not isinstance(mask, torch.Tensor) or bool(
                (~mask).any() if mask.dtype == torch.bool else mask.any()
            )
            self.mask = mask, hides
        return mask is not None and self.mask[1]

    def positions(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (1, 1, R) in fp32, widened once per pass."""
        if self.tables is None or self.tables[0] is not given[0]:
            cos, sin = (table.detach().float().flatten().contiguous() for table in given)
            self.tables = given[0], cos, sin
        return self.tables[1:]


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model: modules with attention of their own, in order."""
    return [module for module in model.modules() if hasattr(module, "self_attn") and hasattr(module, "input_layernorm")]


class Layer:
    """One decoder layer: which parts of it are compiled, and its programs."""

    def __init__(self, step: Step, module: nn.Module, index: int) -> None:
        self.step, self.module, self.index = step, module, index
        self.parts: Any = None  # `Parts`, unless there is a reason
        self.experts: Any = None  # `Experts`, if they are compiled too
        self.kind = Kind()
        try:
            self.parts = parts_of(module)
            self.dtype, self.place = self.parts.first.weight.dtype, self.parts.attention.layer_idx
            self.kind = step.kinds.setdefault(kind_of(self.parts), self.kind)
        except Unlike as error:
            self.kind.reason = str(error)

    @property
    def reason(self) -> str:
        """Why modules compute this layer; empty if programs do."""
        return self.kind.reason

    def forward(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Replaces the layer's forward pass; `original` computes whatever programs do not."""
        if self.kind.reason or not self.step.here.active:
            return original(*args, **kwargs)
        x, positions = args[0] if args else kwargs.get("hidden_states"), kwargs.get("position_embeddings")
        cache_layer = self._cache_layer(kwargs)
        room = None if cache_layer is None else growing(cache_layer, self.dtype)
        if room is None or x is None or not isinstance(positions, tuple) or self.step.here.masks(kwargs):
            return original(*args, **kwargs)
        if room.used + 1 >= 2 * self.kind.checked:
            compare(self.kind, self.parts, LayerCall(x, cache_layer, args, kwargs))
            if self.kind.reason:
                return original(*args, **kwargs)
            self.kind.checked = room.used + 1
        return self._compute(x, room, positions, cache_layer)

    def _cache_layer(self, kwargs: dict[str, Any]) -> Any:
        """The layer's part of the cache that a pass was given, or None."""
        cache = kwargs.get(NEW)
        layers = getattr(kwargs.get(OLD) if cache is None else cache, "layers", ())
        return layers[self.place] if self.place < len(layers) else None

    def _compute(self, x: torch.Tensor, room: Growing, positions: tuple, cache_layer: Any) -> torch.Tensor:
        number = threads.count()
        half = self._run(x, room, positions, number)
        room.add(cache_layer)
        if isinstance(half, Whole):
            out = torch.empty_like(x)
            half.write_to(out)
            self._serve(half, number)
            return out
        stream, normed = half.results()
        inner = self.parts.block(normed.to(x.dtype).view_as(x))
        inner = inner[0] if isinstance(inner, tuple) else inner
        return (stream.view_as(x) + inner.float() * self.parts.factor).to(x.dtype)

    def _run(self, x: torch.Tensor, room: Growing, positions: tuple, number: int) -> Half:
        """Compute up to the experts, or up to the router's choice; the cache gets this token's keys and values."""
        half = self._program(x.dtype, number)
        half.aim(x, *self.step.here.positions(positions), room)
        half.program.run(number, 0, half.end)
        return half

    def _program(self, dtype: torch.dtype, number: int) -> Half:
        """This thread's program, for so many threads."""
        here, kind = self.step.here, self.kind
        key = dtype, number, kind.turned, kind.chosen, kind.divide
        known = here.programs.get(self.index)
        if known is None or known[0] != key:
            self.experts = experts_of(kind, self.parts.block)
            parts = self.parts, here.memory, kind.turned, dtype == torch.bfloat16
            half = Half(*parts) if self.experts is None else Whole(*parts, self.experts, form_of(self.experts.module))
            known = here.programs[self.index] = key, half
        return known[1]

    # Experts ----------------------------------------------------------------------------------------------------------

    def _serve(self, half: Whole, number: int) -> None:
        """Compute the chosen experts as the runtime brings them, and their sum."""
        runtime, site = self.experts.module._mixoff
        if self.step.ask is not None:
            self.step.ask(site, half.results()[1].to(self.dtype)[None])
        if runtime.reroute is not None or runtime._routing:
            self._tell(half, runtime, site)
        chosen, weights = half.chosen.tolist(), half.weights.tolist()
        place = {expert: i for i, expert in enumerate(chosen)}
        missing = len(place)
        if runtime.reroute is not None or runtime.ranks.count > 1:
            missing = self._dropped(half, chosen, place, runtime.ranks.held[site])

        def compute(loaded: dict[int, dict[str, Any]]) -> None:
            nonlocal missing
            rows = [(place[expert], parts) for expert, parts in loaded.items() if expert in place]
            if rows:
                missing -= len(rows)
                half.experts(rows, number, missing == 0)

        given = [weights[i] if weights[i] == weights[i] else 0.0 for i in place.values()]  # NaN counts as 0
        runtime.serve(site, list(place), compute, None if runtime.in_prompt() else given)
        if missing:  # none was computed last: other ranks have experts, or a `reroute` chose none, or one twice
            for i, expert in enumerate(chosen):
                if place.get(expert, i) != i:
                    half.outs[i] = half.outs[place[expert]]
        runtime.ranks.joined(half.outs)
        if missing:
            half.finish(number)

    @staticmethod
    def _dropped(half: Whole, chosen: list[int], place: dict[int, int], held: range) -> int:
        """Drop indices of other ranks' experts, and of none; returns for how many outputs the sum waits.

        One more than will come if some rows have to be set by hand first, or come from other ranks.
        """
        for expert in [expert for expert in place if expert not in held]:
            del place[expert]
        if len(place) == len(chosen):
            return len(place)
        half.outs.zero_()
        return len(place) + 1

    @staticmethod
    def _tell(half: Whole, runtime: Runtime, site: int) -> None:
        """Show the choice to those who listen, and let `reroute` change it."""
        if runtime.reroute is not None:
            chosen, weights = runtime.reroute(site, half.chosen[None].clone(), half.weights[None].clone())
            half.chosen.copy_(chosen[0])
            half.weights.copy_(weights[0])
        runtime.note_routing(site, half.chosen[None].clone(), half.weights[None].clone())

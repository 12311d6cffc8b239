"""A model whose experts are all in the slots of a CUDA card: a token's layer without a word from the host.

The router's choice stays on the card. A table there tells where each expert is, and kernels look it up, so the host
queues a layer and never waits. Tables are made once, when the last expert has arrived, and hold until slots change.
Bits are those of `Runtime.serve`: the same kernels sum in the same order. What needs the choice on the host (listeners,
traces, `reroute`) takes that way, as prompts and every partly resident model do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mixoff import kernels
from mixoff.kernels.triton import products
from mixoff.runtime.experts import fuses, normed

if TYPE_CHECKING:
    from mixoff.cache.cache import ExpertCache
    from mixoff.runtime.runtime import Runtime


class Residents:
    """Tables of one runtime's experts by site. cache: the one that they are true for; None before there are any."""

    def __init__(self) -> None:
        self.cache: ExpertCache | None = None
        self.tables: list[products.Table | None] = []

    def compute(self, module: torch.nn.Module, x: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor | None:
        """One token x (1, D) through its experts (1, K) -> (K, 1, D); None where `Runtime.serve` has to do it."""
        runtime, site = module._mixoff
        if runtime.device is None or len(x) != 1 or runtime.in_prompt() or _watched(runtime):
            return None
        with runtime._lock:
            table = self.table(runtime, site)
            if table is None or not fuses(module, x, dict(zip(NAMES, table.forms, strict=True)), runtime.exact):
                return None
            runtime.cache.hits += top_k_index.numel()
            runtime._pass.served = getattr(runtime._pass, "served", 0) + 1
            return normed(module, kernels.gated_mlps(x, table.chosen(top_k_index[0]), runtime.exact))

    def found(self, runtime: Runtime) -> bool:
        """Whether kernels find every expert of the model, and nobody wants to see the router's choice."""
        if runtime.device is None or _watched(runtime):
            return False
        with runtime._lock:
            return all(self.table(runtime, site) is not None for site in range(len(runtime.source.sites)))

    def table(self, runtime: Runtime, site: int) -> products.Table | None:
        """Where a site's experts are; None unless every expert of the model is in a slot to stay."""
        cache = runtime.cache
        if not runtime.ended or runtime._closed:
            return None
        if self.cache is not cache:
            if cache.forgets or len(cache.slot_of) < sum(site.num_experts for site in runtime.source.sites):
                return None
            assert runtime.device is not None  # `compute` asked
            runtime.device.synchronize()  # once: every copy has ended
            self.tables = [_table(runtime, i) for i in range(len(runtime.source.sites))]
            self.cache = cache
        return self.tables[site]


def _watched(runtime: Runtime) -> bool:
    """Whether someone wants to see the router's choice, or to change it, or other ranks compute a part of it."""
    return bool(runtime._listeners or runtime._routing or runtime.reroute) or runtime.ranks.count > 1


NAMES = ("gate_up_proj", "down_proj")


def _table(runtime: Runtime, site: int) -> products.Table | None:
    """The table of one site; None if its experts have no gate and up in one matrix, or are not quantized."""
    slots = [runtime.place[runtime.cache.slot_of[site, e]] for e in range(runtime.source.sites[site].num_experts)]
    experts = [runtime.arena.weights(slot, site) for slot in slots]
    if not all(isinstance(experts[0].get(name), kernels.QTensor) for name in NAMES):
        return None
    return products.table([(weights[NAMES[0]], weights[NAMES[1]]) for weights in experts])  # type: ignore[misc]

"""Knobs that trade quality for bytes: each changes what the model computes, and all are off by default.

    model.mixoff.reroute = mixoff.quality.dynamic_top_k(0.8)    # None is exact again

Letters: **T** tokens, **K** experts per token, **E** experts, **L** sites. A knob is a function
`(site, index (T, K), weights (T, K)) -> (index, weights)` that may change the router's choice. docs/quantization.md has
the cost of each, measured by `quality`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mixoff.cache.cache import ExpertCache
from mixoff.errors import MixoffError
from mixoff.shapes.routers import routers_of
from mixoff.trace.trace import MAX_EXPERTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mixoff.runtime.runtime import Runtime

NOBODY = MAX_EXPERTS  # above all experts' numbers: transformers reads any index of E or more as "no expert"

Reroute = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def leave_out(index: Tensor, weights: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """The choice without the experts marked in `dropped` (T, K); a token's other weights are scaled to the old sum.

    >>> leave_out(torch.tensor([[3, 1]]), torch.tensor([[0.75, 0.25]]), torch.tensor([[False, True]]))
    (tensor([[    3, 32767]]), tensor([[1., 0.]]))
    """
    kept = weights.masked_fill(dropped, 0)  # (T, K)
    total = kept.sum(-1, keepdim=True)  # (T, 1)
    raised = torch.where(total > 0, weights.sum(-1, keepdim=True) / total, 0)
    return index.masked_fill(dropped, NOBODY), (kept * raised).to(weights.dtype)


def shares(weights: Tensor) -> Tensor:
    """Share of each expert in its token's weights, (T, K)."""
    return weights.float() / weights.float().sum(-1, keepdim=True).clamp_min(1e-20)


def heaviest(weights: Tensor, count: int) -> Tensor:
    """Marks the `count` heaviest experts of each token, (T, K) bool."""
    top = weights.topk(min(count, weights.shape[-1]), -1).indices
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, top, True)


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise MixoffError(f"{name} is {value!r}: give a share of the router's weights, from 0 to 1")
    return value


def dynamic_top_k(mass: float = 0.8) -> Reroute:
    """Lossy: keeps each token's fewest experts with `mass` of the weights, so a confident router needs only one.

    1 is exact.

    Source: Huang et al., Harder Tasks Need More Experts: Dynamic Routing in MoE Models (arXiv 2403.07652), there with
    routers trained for it.
    """
    _share("mass", mass)

    def reroute(site: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ordered, order = shares(weights).sort(-1, descending=True)  # (T, K)
        before = ordered.cumsum(-1) - ordered  # sum of the heavier ones
        enough = before >= mass if mass < 1 else before > 1  # a weight that rounds to 1 leaves none over at mass 1
        superfluous = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, enough)
        return leave_out(index, weights, superfluous & ~heaviest(weights, 1))

    return reroute


def skip_light(share: float = 0.2) -> Reroute:
    """Lossy: leaves out experts with less than `share` of their token's weights, but never a token's heaviest.

    0 is exact.

    Source: the dynamic skipping of Lu et al. (see `prune`), whose threshold is calibrated for each layer.
    """
    _share("share", share)

    def reroute(site: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return leave_out(index, weights, (shares(weights) < share) & ~heaviest(weights, 1))

    return reroute


def prune(counts: Sequence[Sequence[int]], keep: int) -> Reroute:
    """Lossy: removes all but the `keep` most used experts of each site. counts: (L, E), from `Trace.counts`.

    A token whose experts are all removed gets nothing from that layer. Source: Lu et al., Not All Experts are Equal
    (arXiv 2402.14800), who choose by reconstruction rather than by use.
    """
    used = torch.as_tensor(counts)  # (L, E)
    if used.ndim != 2 or not 1 <= keep <= used.shape[1]:
        raise MixoffError(f"cannot keep {keep!r} experts per layer of counts {tuple(used.shape)}: give counts (L, E)")
    gone = ~heaviest(used, keep)  # (L, E)

    def reroute(site: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        inside = index < gone.shape[1]
        return leave_out(index, weights, inside & gone[site][index.clamp_max(gone.shape[1] - 1)])

    return reroute


# Knobs that look at the cache ----------------------------------------------------------------------------------------


class Tier(Protocol):
    """Which experts are in the fast tier."""

    def has(self, site: int, expert: int) -> bool:
        """Whether the expert is in it."""

    def ask(self, site: int, experts: list[int]) -> None:
        """Note that a token asks for these, distinct and in router order."""


class Live:
    """The fast tier of a runtime. In a prompt every expert counts as present: it asks for nearly all of them."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def has(self, site: int, expert: int) -> bool:
        """Whether the expert is in a slot now, or the pass is a prompt."""
        return self.runtime.in_prompt() or (site, expert) in self.runtime.cache.slot_of

    def ask(self, site: int, experts: list[int]) -> None:
        """Nothing to do: the runtime notes it itself."""


class Shadow:
    """A cache of `slots` per site without weights, for evaluation.

    A window passes through the model at once, but token by token through this cache, so that hits are those of
    decoding.
    """

    def __init__(self, slots: int, policy: str = "lru") -> None:
        self.caches: dict[int, ExpertCache] = defaultdict(lambda: ExpertCache([slots], policy))
        self.hits = self.misses = 0

    def has(self, site: int, expert: int) -> bool:
        """Whether the expert is in one of the site's slots."""
        return (site, expert) in self.caches[site].slot_of

    def ask(self, site: int, experts: list[int]) -> None:
        """Serve `experts` from the site's slots, and count hits and misses."""
        for grant in self.caches[site].access(0, [(site, expert) for expert in experts]):
            self.hits += grant.kind == "hit"
            self.misses += grant.kind != "hit"


def _missing(tier: Tier, site: int, index: Tensor, drop: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
    """Marks the experts that are not in the tier when their token asks, (T, K) bool.

    drop: `(t, missing (K,)) -> dropped (K,)`, the experts that token t leaves out; None: no expert
    """
    marked = torch.zeros_like(index, dtype=torch.bool)
    for t, chosen in enumerate(index.tolist()):
        marked[t] = torch.tensor([e < NOBODY and not tier.has(site, e) for e in chosen])
        if drop is not None:
            marked[t] = drop(t, marked[t])
        asked = chosen if drop is None else [e for e, out in zip(chosen, marked[t].tolist(), strict=True) if not out]
        tier.ask(site, list(dict.fromkeys(e for e in asked if e < NOBODY)))
    return marked


def skip_misses(tier: Runtime | Shadow, keep: int = 1) -> Reroute:
    """Lossy: leaves out experts that are not in the fast tier, except a token's `keep` heaviest; K is exact.

    tier: a runtime (`model.mixoff`), or a `Shadow` for evaluation. Source: HOBBIT (arXiv 2411.01433), which leaves out
    the least important missing experts, and uses lower precision for others.
    """
    fast: Tier = tier if isinstance(tier, Shadow) else Live(tier)
    if keep < 0:
        raise MixoffError(f"keep is {keep!r}: give the number of experts that every token waits for, 0 or more")

    def reroute(site: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        spared = heaviest(weights, keep) if keep else torch.zeros_like(index, dtype=torch.bool)
        return leave_out(index, weights, _missing(fast, site, index, lambda t, missing: missing & ~spared[t]))

    return reroute


def substitute_misses(tier: Runtime | Shadow, similar: Tensor, share: float = 0.2) -> Reroute:
    """Lossy: computes the most similar expert of the fast tier in place of a missing one; 0 is exact.

    Only experts with less than `share` of their token's weights are replaced, by one that the token does not use yet,
    under their own weight. Sensible only where experts are alike: if the outputs of two differ by more than either is
    large, leaving the expert out (`skip_misses`) costs less than the wrong one. Source: BuddyMoE (arXiv 2511.10054);
    Skliar et al. (arXiv 2412.00099) have the router choose again among residents instead.

    tier: as for `skip_misses`. similar: (L, E, E), larger for experts that are more alike, as from `router_similarity`.
    """
    _share("share", share)
    if similar.ndim != 3 or similar.shape[1] != similar.shape[2]:
        raise MixoffError(
            f"similar has shape {tuple(similar.shape)}: give a likeness of all pairs of experts, (L, E, E)"
        )
    fast: Tier = tier if isinstance(tier, Shadow) else Live(tier)
    ranked = similar.argsort(dim=-1, descending=True, stable=True).tolist()  # (L, E, E)

    def reroute(site: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        light, changed = (shares(weights) < share).tolist(), index.tolist()
        for chosen, is_light in zip(changed, light, strict=True):
            for k, e in enumerate(chosen):
                if is_light[k] and e < NOBODY and not fast.has(site, e):
                    found = (r for r in ranked[site][e] if r not in chosen and fast.has(site, r))
                    chosen[k] = next(found, e)
            fast.ask(site, list(dict.fromkeys(e for e in chosen if e < NOBODY)))
        return torch.tensor(changed, dtype=index.dtype, device=index.device), weights

    return reroute


def router_similarity(model: PreTrainedModel) -> Tensor:
    """Cosine between the router's rows of all pairs of experts, (L, E, E): what routers ask alike, no text needed."""
    rows = [functional.normalize(router.weight.detach().float(), dim=1).cpu() for router in routers_of(model)]
    return torch.stack([unit @ unit.T for unit in rows])  # (L, E, E)


def coarse_misses(tier: Tier, num_experts: int) -> Reroute:
    """Lossy, for evaluation: computes a missing expert from its coarse twin, number + E.

    The model must have the twins, as inside `quality.with_twins`. Source: HOBBIT (arXiv 2411.01433).
    """

    def reroute(site: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return index + num_experts * _missing(tier, site, index), weights

    return reroute

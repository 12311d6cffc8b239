"""Routers that lose rows: which tensors of a store hold them, and a loaded model that computes without some.

Letters: **T** tokens, **K** experts per token, **E** experts, **L** sites.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixoff.checkpoints.checkpoint import TensorRange
from mixoff.errors import CheckpointError
from mixoff.shapes.config import expert_modules
from mixoff.shapes.routers import routers_of
from mixoff.shapes.sites import Site

SEGMENT = re.compile(r"\.(gate|router)\.")  # in names of tensors, on the Hub and in transformers


def prunable(model: PreTrainedModel) -> list[nn.Module]:
    """The router of each site. Raises CheckpointError for a family whose routers cannot lose a row."""
    routers = routers_of(model)
    if None in routers:
        raise _refused(model, "its routers are not next to the experts, as `gate` or `router`")
    for router, experts in zip(routers, expert_modules(model).values(), strict=True):
        E = experts.num_experts
        tensors = router.state_dict()
        odd = [key for key, w in tensors.items() if w.shape[0] != E or "." in key]
        if odd or not tensors:
            raise _refused(model, f"its router's {odd[0] if odd else 'weights'} is not one row per expert")
        if getattr(router, "num_group", 1) > 1:
            raise _refused(model, f"its router chooses among {router.num_group} groups of equal size")
    return routers


def _refused(model: PreTrainedModel, why: str) -> CheckpointError:
    name = type(model).__name__
    return CheckpointError(f"{name} cannot be pruned here, because {why}: use fewer bits instead (`mixoff convert`)")


def stored_routers(
    model: PreTrainedModel, sites: Sequence[Site], backbone: Iterable[tuple[str, TensorRange]]
) -> dict[str, int]:
    """The site of each router tensor of a store, by the tensor's name; the skeleton says how many there must be."""
    layers = {site.layer: i for i, site in enumerate(sites)}
    if len(layers) < len(sites) or len({site.num_experts for site in sites}) > 1:
        raise _refused(model, "its layers have different numbers or sets of experts")
    found = {}
    for name, t in backbone:
        i = layers.get(int(m[1])) if (m := re.search(r"layers\.(\d+)\.", name)) else None
        if i is not None and SEGMENT.search(name) and t.shape[0] == sites[i].num_experts:
            found[name] = i
    for i, router in enumerate(prunable(model)):
        if sum(place == i for place in found.values()) != len(router.state_dict()):
            raise _refused(model, f"the router of layer {sites[i].layer} has other tensors in the files")
    return found


class Narrowed:
    """A loaded model whose routers choose among some experts only, which computes as the pruned store will.

    Rows leave the routers, and `reroute` gives each remaining row its expert's old number, so no expert moves.
    Usable as a context manager, which restores the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.routers = model, prunable(model)
        self.originals = [{key: w.clone() for key, w in router.state_dict().items()} for router in self.routers]
        self.kept = [list(range(site.num_experts)) for site in model.mixoff.source.sites]
        self.counts = torch.zeros(len(self.kept), max(map(len, self.kept)), dtype=torch.int64)  # (L, E)

    def __enter__(self) -> Narrowed:
        self.before, self.model.mixoff.reroute = self.model.mixoff.reroute, self._reroute
        return self

    def __exit__(self, *error: object) -> None:
        self.model.mixoff.reroute = self.before
        for i, rows in enumerate(self.originals):
            self.keep(i, range(len(next(iter(rows.values())))))

    @torch.no_grad()
    def keep(self, i: int, kept: Iterable[int]) -> None:
        """Let site `i` choose among these experts, in ascending order."""
        router, self.kept[i] = self.routers[i], sorted(kept)
        for key, rows in self.originals[i].items():
            old = getattr(router, key)
            new = rows[self.kept[i]]  # (kept, ...)
            setattr(router, key, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
        if hasattr(router, "num_experts"):
            router.num_experts = len(self.kept[i])

    def _reroute(self, site: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        numbers = torch.tensor(self.kept[site], device=index.device)[index.long()].to(index.dtype)  # (T, K)
        self.counts[site] += torch.bincount(numbers.flatten().cpu().long(), minlength=self.counts.shape[1])
        return numbers, weights

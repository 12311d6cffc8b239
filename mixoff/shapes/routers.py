"""Where a model keeps its routers: as `gate` or `router` next to the experts, in every family that is served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mixoff.shapes.config import expert_modules

if TYPE_CHECKING:
    from torch import nn

NAMES = ("gate", "router")


def routers_of(model: nn.Module) -> list[Any]:
    """The router of each site, a module; None where it is somewhere else."""
    blocks = (model.get_submodule(name.rpartition(".")[0]) for name in expert_modules(model))
    return [router_in(block) for block in blocks]


def router_in(block: nn.Module) -> Any:
    """The router of an MoE block, a module; None if it has none."""
    modules = dict(block.named_children())
    return next((modules[name] for name in NAMES if name in modules), None)

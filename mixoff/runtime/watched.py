"""Whether modules are as they were: what was planned or captured once computes neither hooks nor replaced modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

# hooks that only collect what somebody asks for: transformers' for `output_…`; ours for guesses, and for passes
QUIET = ("output_capturing_hook", "before_router", "note_pass")


class Watched:
    """The modules inside `roots` at the time when this was made."""

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        self.children = [
            (parent._modules, name, child)
            for root in roots
            for parent in root.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]

    def untouched(self) -> bool:
        """Whether all are in place, without a forward pass of their own or hooks, but for QUIET ones."""
        return not _has_any_global_hook() and all(_untouched(*child) for child in self.children)


def _untouched(modules: dict[str, Any], name: str, child: Any) -> bool:
    if name not in modules or modules[name] is not child or "forward" in vars(child):
        return False
    hooks = (*child._forward_hooks.values(), *child._forward_pre_hooks.values())
    return not hooks or all(getattr(hook, "__name__", "") in QUIET for hook in hooks)

"""Lets something happen around each forward pass of a module, whatever ends it.

Hooks of PyTorch cannot: those that are to be called "always" follow an `Exception`, not a `KeyboardInterrupt`. Does not
know models or experts.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]


def wrap(module: nn.Module, around: Callable[[Forward, tuple, dict], Any]) -> Callable[[], None]:
    """Let `around(forward, args, kwargs)` replace `module.forward(*args, **kwargs)`; returns a function to end it.

    The signature stays, which transformers looks at. A wrapper that is there already is called within, and ends too.
    """
    before, module_of = vars(module).get("forward"), weakref.ref(module)  # a bound method would keep the module alive

    def own(*args: Any, **kwargs: Any) -> Any:
        return type(module_of()).forward(module_of(), *args, **kwargs)

    @functools.wraps(type(module).forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(before or own, args, kwargs)

    forward.__signature__ = inspect.signature(module.forward)  # without `self`
    del forward.__wrapped__
    module.forward = forward
    return lambda: vars(module).pop("forward", None)

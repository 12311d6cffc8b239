"""Runs code around each forward pass of a module, however the pass ends.

PyTorch's hooks cannot do this: those that are "always called" follow an `Exception`, but not a `KeyboardInterrupt`.
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

    The signature stays, since transformers inspects it. An earlier wrapper is called inside this one, and ends with it.
    """
    before, module_of = vars(module).get("forward"), weakref.ref(module)  # a bound method would keep the module alive

    def class_forward(*args: Any, **kwargs: Any) -> Any:
        owner: Any = module_of()
        return type(owner).forward(owner, *args, **kwargs)

    @functools.wraps(type(module).forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(before or class_forward, args, kwargs)

    forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]  # without `self`
    del forward.__wrapped__
    module.forward = forward
    return lambda: vars(module).pop("forward", None)

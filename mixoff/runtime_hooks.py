"""What is attached to a model while a runtime serves its experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mixoff.kernels.cpu.threads import borrow, give_back
from mixoff.passes import wrap


def lend(backbone: torch.nn.Module) -> Callable[[], None]:
    """`borrow` while `backbone` passes over one token on a CPU; returns a function that ends it.

    For quantized backbones: PyTorch's last bits may depend on its number of threads, and a backbone in 16 bits is to
    equal plain transformers' bit for bit.
    """

    def around(forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        give_back()  # what an interrupt in `finally` has left
        ids = read_by(args, kwargs)
        if ids is None or ids.shape[1] != 1 or ids.device.type != "cpu":
            return forward(*args, **kwargs)
        try:
            borrow()
            return forward(*args, **kwargs)
        finally:
            give_back()

    return wrap(backbone, around)


def read_by(args: tuple, kwargs: dict) -> torch.Tensor | None:
    """What a pass with these arguments reads: ids (B, T), or embeddings (B, T, D)."""
    return next((x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)

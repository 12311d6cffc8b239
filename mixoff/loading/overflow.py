"""Notices that a model overflows in fp16, at its first logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mixoff.errors import MixoffError


def watch(model: nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Look at the last logits (B, V) of the first pass; `.remove()` ends it, and so does the first look.

    The pass raises MixoffError if they are NaN or infinite: sampling from them would end in an assertion on the card,
    after which no process can use it any more. Minus infinity may be a mask.
    """

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is None:
            return
        if not bounded(logits[:, -1]):
            raise MixoffError(
                "the first logits are not finite: this model's activations overflow float16. Load it with "
                'dtype="float32", or on a card from sm_80 on, which computes in bfloat16'
            )
        handle.remove()

    handle = model.register_forward_hook(after)
    return handle


def bounded(logits: torch.Tensor) -> bool:
    """Whether no logit is NaN or plus infinity; the host waits for the device."""
    return bool((logits < torch.inf).all())

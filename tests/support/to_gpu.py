"""A loaded model on a GPU that has no bytes: its tensors know only their device."""

from unittest import mock

import torch

from mixoff.loading import refusals
from mixoff.transfer import cuda


class Idle:
    """A device on which nothing happens."""

    where = torch.device("cpu")
    event = computing = synchronize = lambda self, *args: self
    wait_event = record_event = copy = unpin = give_back = lambda self, *args: None
    query = lambda self: True  # noqa: E731

    def __init__(self):
        self.copying = self.returning = self

    def empty(self, nbytes):
        return torch.zeros(nbytes, dtype=torch.uint8)

    pinned = empty

    def describe(self):
        return cuda.Gpu("NVIDIA L4", (8, 9), 24 << 30, 23 << 30)


def to_gpu(model):
    """Move a loaded model and its runtime to a GPU that has no bytes."""
    runtime = model.mixoff
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mock.patch.object(refusals.Served, "_apply", torch.nn.Module._apply):  # what users may not do
            model.to("cuda")
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    for module in model.modules():
        if getattr(module, "quantized", None) is not None:
            module.quantized = module.quantized.to("cuda")
    runtime.arena.slots = torch.empty_like(runtime.arena.slots, device="cuda")
    runtime.arena._views.clear()
    runtime.scratch = torch.empty_like(runtime.scratch, device="cuda")

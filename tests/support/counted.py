"""Counts what a token asks of a card, without one: launches, calls of ATen, looks of the host and their bytes."""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralConfig

import mixoff
from mixoff.kernels.triton import products
from mixoff.loading import together
from mixoff.runtime import runtime
from mixoff.runtime.backend import to_host
from tiny import SHAPE


def save_blocks(folder):
    """A store of two layers of four experts, whose gates are fused, and whose q, k and v are whole blocks."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_local_experts": 4}
    torch.manual_seed(0)
    config = MixtralConfig(**(SHAPE | shape | {"num_key_value_heads": 4}))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "hub")
    return mixoff.convert(folder / "hub", folder / "store", scheme="mixed")


class Calls(TorchDispatchMode):
    """Calls of ATen, but for views, which cost a card nothing, and for the zeros of a `Card`."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.zero_.default:
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def looking():
    """The host reads the router's choice as from a card: yields the bytes of each look."""
    looks = []

    def look(self, site, experts, weights):
        looks.append(4 * (experts.numel() + weights.numel()))
        return tuple(to_host(experts, weights))

    with mock.patch.object(runtime.Runtime, "look", look):
        yield looks


@contextmanager
def card_of(loops):
    """Let these kernels compute on the CPU's tensors."""
    with ExitStack() as stack:
        for module, name, value in (
            (products, "DEVICES", ("cpu",)),
            (products, "loops", lambda: loops),
            (together, "DEVICES", ("cpu",)),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield loops

"""Counts what a token asks of a card, without one: launches, calls of ATen, looks of the host and their bytes."""

import ctypes
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralConfig

import mixoff
from mixoff.classroom.launches import OUT, Card
from mixoff.kernels.triton import products
from mixoff.loading import together
from mixoff.transfer.mailbox import Mailbox
from tiny import SHAPE


def save_blocks(folder):
    """A store of two layers of four experts, whose gates are fused, and whose q, k and v are whole blocks."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_local_experts": 4}
    torch.manual_seed(0)
    config = MixtralConfig(**(SHAPE | shape | {"num_key_value_heads": 4}))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "hub")
    return mixoff.convert(folder / "hub", folder / "store", scheme="mixed")


class Mixing(Card):
    """A card whose outputs depend on the activations, and on the first bytes of each matrix; in fp32."""

    def launch(self, name, grid, args):
        """Note a kernel, and write numbers that no other input would give."""
        self.launches.append((name, (*grid, 1, 1)[2]))
        x, out = args[0].float(), args[OUT[name]]
        if name == "rotate":
            out.copy_(x.flip(-1))
            return
        if name == "dequantize":
            out.fill_(0.01)
            return
        images, E, n = args[1], (*grid, 1, 1)[2], torch.arange(out.shape[-1]) + 1
        at = images.tolist()[:E] if images.dtype == torch.int64 else [images.data_ptr()]
        bytes_of = torch.tensor([sum(ctypes.string_at(address, 256)) % 1009 / 1009 for address in at])  # (E,)
        mixed = x @ torch.outer(torch.arange(x.shape[-1]) + 1.0, n).sin() / x.shape[-1]  # (T, N) or (E, T, N)
        out.copy_((mixed + bytes_of[:, None, None] * n.cos() / 10).view_as(out))


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
    """Yields the bytes of each look of the host at the card."""
    looks, honest = [], Mailbox.bring

    def bring(self, *tensors):
        looks.append(sum(t.numel() * t.element_size() for t in tensors))
        return honest(self, *tensors)

    with mock.patch.object(Mailbox, "bring", bring):
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

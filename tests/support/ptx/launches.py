"""Stands in for a card: Triton specializes and compiles each launch for a chip, and the emulator runs its PTX."""

import ctypes
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mixoff.kernels.triton import loops
from ptx.code import parse
from ptx.machine import Machine
from ptx.memory import Global

KERNELS = ("linear", "gated", "rotate", "dequantize", "strided", "strided_weights")


class Driver:
    """What Triton asks of a driver before it compiles; the device's number is that of the chip."""

    def __init__(self, sm):
        self.sm = sm

    def get_current_device(self):
        return self.sm

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.sm, 32)


@dataclass(frozen=True)
class Launch:
    """One launch. widths: bytes per lane of accesses, by tensor."""

    kernel: str
    grid: tuple[int, ...]
    compiled: object
    steps: int
    widths: dict[str, set[int]]


class Card:
    """The kernels for a chip, as `products.loops()` has them. reached: tensors that they know by address alone."""

    def __init__(self, sm, reached=()):
        self.driver, self.launches, self.reached = Driver(sm), [], reached
        for name in KERNELS:
            setattr(self, name, Kernel(self, getattr(loops, name)))

    def numbers(self, values):
        """Arguments as the kernel gets them: tensors by their addresses."""
        return [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]


class Kernel:
    """One kernel: `kernel[grid](...)` runs it."""

    def __init__(self, card, function):
        self.card, self.function = card, function

    def __getitem__(self, grid):
        return lambda *args, **named: self.launch((*grid, 1, 1)[:3], args, named)

    def launch(self, grid, args, named):
        """Compile for these arguments as Triton would, and run."""
        with mock.patch.object(driver, "_active", self.card.driver):
            compiled = self.function.run(*args, grid=grid, warmup=True, **named)
        values = dict(zip(self.function.arg_names, args, strict=False)) | named
        signature = compiled.src.signature
        given = [values[name] for name in self.function.arg_names if signature[name] != "constexpr"]
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        tensors |= {f"tensor {i}": tensor for i, tensor in enumerate(self.card.reached)}
        memory = Global({name: region(tensor) for name, tensor in tensors.items()})
        threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
        machine = Machine(parse(compiled.asm["ptx"]), self.card.numbers(given), memory, grid, threads, shared)
        machine.run()
        self.card.launches.append(Launch(self.function.__name__, grid, compiled, machine.steps, memory.widths))


def region(tensor):
    """First address and bytes of a tensor, with the rest of the words at its ends: kernels load whole words."""
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    start, nbytes = first // 4 * 4, -(-end // 4) * 4 - first // 4 * 4
    if not nbytes:
        return start, np.zeros(0, np.uint8)
    return start, np.frombuffer((ctypes.c_uint8 * nbytes).from_address(start), np.uint8)

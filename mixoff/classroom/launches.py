"""Counts what a CUDA card would be asked for, without one: the package's Triton kernels, and operations of torch.

Kernels are noted and compute nothing, so counts are those of a card, and numbers are zeros. Needs no triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from mixoff.kernels.triton import products

OUT = {"linear": 2, "gated": 2, "rotate": 1, "dequantize": 1}  # the argument that a kernel writes to


class Card:
    """Stands for the compiled kernels. launches: name of each kernel, and the number of experts that it serves."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Kernel:
        return Kernel(self, name)

    def launch(self, name: str, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Note a kernel and the third dimension of its grid; what it would compute is zero."""
        arguments[OUT[name]].zero_()
        self.launches.append((name, (*grid, 1, 1)[2]))


class Kernel:
    """One kernel of a `Card`, launched as Triton's are: `kernel[grid](...)`."""

    def __init__(self, card: Card, name: str) -> None:
        self.card, self.name = card, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.card.launch(self.name, grid, arguments)


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Inside, products with quantized weights take the way of a card: yields the list of their launches."""
    card = Card()
    with mock.patch.multiple(products, DEVICES=("cpu",), loops=lambda: card):
        yield card.launches


class Operations(TorchDispatchMode):
    """Inside, counts operations of torch that compute something; on a card each is at least one launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))

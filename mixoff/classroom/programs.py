"""Runs a kernel written for Triton as plain Python, program by program, and counts the bytes that it touches.

Nine names of `triton.language` over NumPy arrays, enough for a matrix-vector product, on systems without triton too.
It has no blocks in parallel, no types but NumPy's, and no speed. Triton's own interpreter judges everything else.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np

INTERPRET = "TRITON_INTERPRET"  # read when triton is imported


def interpreter() -> ModuleType | None:
    """Triton with its interpreter on, which runs kernels on the CPU; None where triton is missing.

    None too where something imported triton before with the interpreter off: only a new process can turn it on.
    """
    if "triton" in sys.modules and os.environ.get(INTERPRET) != "1":
        return None
    os.environ[INTERPRET] = "1"
    try:
        import triton.language
    except ImportError:
        return None
    return triton


class Block(np.ndarray):
    """A block of numbers, with the one method of Triton's tensors that kernels need."""

    def to(self, dtype: type) -> Block:
        """The same numbers in another dtype."""
        return self.astype(dtype)


def block(values: Any) -> Block:
    """An array as a `Block`."""
    return np.asarray(values).view(Block)


class Pointer:
    """Places in the memory of an argument; adding numbers gives other places."""

    def __init__(self, name: str, memory: np.ndarray, at: Any = 0) -> None:
        self.name, self.memory, self.at = name, memory, at

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.name, self.memory, self.at + by)

    __radd__ = __add__

    def __sub__(self, by: Any) -> Pointer:
        return self + -by

    def places(self, mask: Any) -> np.ndarray:
        """Flat indices, those of masked places -1. Raises IndexError for a place outside the argument."""
        at = np.broadcast_to(self.at, np.broadcast_shapes(np.shape(self.at), np.shape(mask)))
        live = np.broadcast_to(mask, at.shape)
        if (live & ((at < 0) | (at >= self.memory.size))).any():
            wrong = at[live & ((at < 0) | (at >= self.memory.size))].flat[0]
            raise IndexError(f"{self.name} has {self.memory.size} numbers, and number {wrong} is asked for")
        return np.where(live, at, -1)


def language(number: int, traffic: Counter) -> SimpleNamespace:
    """What a kernel's `tl` means while program `number` runs; `traffic` takes the bytes of each argument."""

    def note(places: np.ndarray, pointer: Pointer, verb: str) -> np.ndarray:
        live = places >= 0
        traffic[f"{pointer.name} {verb}"] += int(live.sum()) * pointer.memory.itemsize
        return live

    def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Block:
        places = pointer.places(mask)
        live = note(places, pointer, "read")
        return block(np.where(live, pointer.memory[places], pointer.memory.dtype.type(other)))

    def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
        places = pointer.places(mask)
        live = note(places, pointer, "written")
        pointer.memory[places[live]] = np.broadcast_to(value, places.shape)[live]

    return SimpleNamespace(
        program_id=lambda axis: number,
        arange=lambda start, end: block(np.arange(start, end, dtype=np.int32)),
        zeros=lambda shape, dtype: block(np.zeros(shape, dtype)),
        sum=lambda values, axis=None: block(np.sum(np.asarray(values), axis)),
        where=lambda condition, one, other: block(np.where(condition, one, other)),
        **{"load": load, "store": store, "constexpr": int, "float32": np.float32, "static_range": range},
    )


tl = language(0, Counter())  # for kernels that are defined where triton is missing; `run` gives each program its own


def plain(kernel: Any) -> Any:
    """The function as it was written, behind wrappers and behind `@triton.jit`, which keeps it as `fn`."""
    kernel = inspect.unwrap(kernel)
    return inspect.unwrap(getattr(kernel, "fn", kernel))


def run(kernel: Callable, programs: int, **arguments: Any) -> Counter:
    """Run `kernel` for programs 0, 1, ... of a grid of one dimension; returns bytes per argument, read and written.

    kernel: a function whose global `tl` is `triton.language`, with `@triton.jit` or without, wrapped or not.
    arguments: by name; an array becomes a pointer to its memory, which `store` changes, and other values stay the same.

    >>> def double(x, out):
    ...     tl.store(out + tl.program_id(0), 2 * tl.load(x + tl.program_id(0)))
    >>> out = np.zeros(3)
    >>> run(double, 3, x=np.array([1.0, 5.0, 2.0]), out=out), out.tolist()
    (Counter({'x read': 24, 'out written': 24}), [2.0, 10.0, 4.0])
    """
    traffic: Counter = Counter()
    kernel = plain(kernel)
    given = {
        name: Pointer(name, value.reshape(-1)) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }
    for number in range(programs):
        scope = kernel.__globals__ | {"tl": language(number, traffic)}
        code, defaults, closure = kernel.__code__, kernel.__defaults__, kernel.__closure__
        FunctionType(code, scope, kernel.__name__, defaults, closure)(**given)
    return traffic

"""Stages over fixed addresses, planned once and run by one compiled call: what a decode step is made of.

Letters: **N** outputs, **K** inputs.
A call from Python costs about as much as 20 kB read from memory, and evicted caches make it several times that; so the
steps between products are compiled too (`stages`), and the threads that share them are handed the whole list.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from types import ModuleType
from typing import TypeAlias

import torch

from mixoff.kernels.cpu import products, threads
from mixoff.kernels.cpu.products import Prepared, job_of
from mixoff.pages import LINE
from mixoff.quantize.layout import BLOCK
from mixoff.quantize.tensor import QTensor

Matrix: TypeAlias = "QTensor | torch.Tensor"
COUNT, PIECES = 2, 3  # places in a stage
PLAIN = 8  # a plain weight takes about so many times the bytes of a packed one


def bits(value: float) -> int:
    """The bits of an fp32 number, as records give them."""
    return struct.unpack("i", struct.pack("f", value))[0]


def narrow(tensor: torch.Tensor) -> bool:
    """Whether compiled code reads it as bf16. Raises KeyError for a dtype that it does not read."""
    return bool(products.KINDS[tensor.dtype])


def readable(matrix: object) -> bool:
    """Whether a program can multiply with it: packed codes, or rows in fp32 or bf16."""
    if isinstance(matrix, QTensor):
        return matrix.metadata_bits == 8 and products.loops() is not None
    if not isinstance(matrix, torch.Tensor) or matrix.dtype not in products.KINDS or not matrix.is_cpu:
        return False
    return matrix.is_contiguous() and matrix.dim() == 2


class Memory:
    """Buffers by name for intermediate values, alike for all layers that one thread computes one after the other."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, int], torch.Tensor] = {}

    def at(self, name: str, nbytes: int) -> int:
        """The address of a buffer, on a cache line of its own."""
        if (name, nbytes) not in self.buffers:
            self.buffers[name, nbytes] = torch.zeros(nbytes + LINE, dtype=torch.uint8)
        return -(-self.buffers[name, nbytes].data_ptr() // LINE) * LINE

    def floats(self, name: str, count: int) -> int:
        """The address of a buffer of fp32 numbers."""
        return self.at(name, 4 * count)

    def tensor(self, name: str, count: int) -> torch.Tensor:
        """A buffer of fp32 numbers as a tensor."""
        skip = self.floats(name, count) - self.buffers[name, 4 * count].data_ptr()
        return self.buffers[name, 4 * count][skip : skip + 4 * count].view(torch.float32)


class Program:
    """A list of stages; `run` computes them in order. `kept` holds what they point to."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.stages, self.jobs = array("q"), array("q")
        self.kept: list[object] = []
        self.prepared: dict[tuple, Prepared] = {}

    def run(self, number: int, first: int = 0, last: int | None = None) -> None:
        """Compute stages first..last on `number` threads."""
        last = len(self) if last is None else last
        stages, jobs = self.stages.buffer_info()[0], self.jobs.buffer_info()[0]
        threads.compute(stages + 8 * products.STAGE * first, last - first, jobs + 8 * fields() * first, number)

    def __len__(self) -> int:
        return len(self.stages) // products.STAGE

    def record(self, values: Iterable[int]) -> array:
        """Numbers that a stage reads; changing them changes what the next run computes."""
        record = array("q", (int(value) for value in values))
        self.kept.append(record)
        return record

    def floats(self, tensor: torch.Tensor | None) -> int:
        """The address of a copy in fp32, which lives as long as this program; 0 for None."""
        if tensor is None:
            return 0
        copy = tensor.detach().to(torch.float32, copy=True).contiguous()
        self.kept.append(copy)
        return copy.data_ptr()

    def stage(self, function: int, job: list[int], count: int = 1, size: int = 0, prepare: int = 0) -> None:
        """Add a stage: `prepare(job)` once, then `function(job, first, last)` for pieces of 0..count.

        size: weights that it reads; one thread computes a small one
        """
        prepare = prepare or stages().nothing.address
        self.stages.extend((prepare, function, count, products.pieces(count, size)))
        self.jobs.extend(job)
        self.jobs.extend([0] * (fields() - len(job)))

    def share(self, stage: int, count: int, size: int) -> None:
        """Change how many pieces a stage has."""
        at = products.STAGE * stage
        self.stages[at + COUNT], self.stages[at + PIECES] = count, products.pieces(count, size)

    def step(self, function: int, record: array, count: int = 1, size: int = 0, prepare: int = 0) -> None:
        """Add a stage of `stages`."""
        self.stage(function, [record.buffer_info()[0]], count, size, prepare)

    def prepare(self, x: int, w: QTensor, name: str) -> Prepared:
        """Add the preparation of activations at x for a product with `w`, unless an earlier one will do."""
        (_, K), size = w.shape, w.group_size
        width = loops().WIDTH[w.bits]
        key = x, K, size, width, w.rotated
        if key not in self.prepared:
            self.prepared[key] = self.room(name, w)
            job = job_of(w, self.prepared[key], x=x)
            self.stage(prepare(w), job)
        return self.prepared[key]

    def room(self, name: str, w: QTensor) -> Prepared:
        """Memory for prepared activations of a product with `w`."""
        K, groups = w.shape[1], w.shape[1] // w.group_size
        values = self.memory.at(f"{name} values", K)
        return Prepared(values, *(self.memory.floats(f"{name} {what}", groups) for what in ("scales", "sums")))

    def product(self, x: int, matrices: list[tuple[Matrix, int]], name: str) -> None:
        """Add the products of K numbers at x with matrices (N, K); each result is written to its address."""
        packed = [(w, out) for w, out in matrices if isinstance(w, QTensor)]
        for w, out in matrices:
            if not isinstance(w, QTensor):
                self.rows(x, w, out)
        if packed:
            jobs = [job_of(w, self.prepare(x, w, name), out=out) for w, out in packed]
            self.several([linear(w) for w, _ in packed], jobs, [blocks(w) for w, _ in packed],
                         sum(w.shape[0] * w.shape[1] for w, _ in packed))  # fmt: skip

    def several(self, functions: list[int], jobs: list[list[int]], counts: list[int], size: int) -> array:
        """Add a stage of several jobs, whose blocks are shared as if they were one; returns the array of the jobs."""
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        places = [self.record(values) for values in (functions, [number for job in jobs for number in job], starts)]
        record = self.record([*(place.buffer_info()[0] for place in places), len(jobs)])
        self.step(stages().several.address, record, starts[-1], size)
        return places[1]

    def rows(self, x: int, w: torch.Tensor, out: int, bias: int = 0, T: int = 1) -> None:
        """Add the product of T rows of K numbers at x with a plain matrix (N, K), straight from its memory."""
        N, K = w.shape
        self.kept.append(w)
        record = self.record(stages().Rows(x, T, w.data_ptr(), narrow(w), bias, K, N, out))
        self.step(stages().rows.address, record, N, PLAIN * N * K * T)


def plain(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ w.T + bias` for few rows x (..., K) and w (N, K) in bf16, in x's dtype -> (..., N), summed in fp32.

    PyTorch takes four times as long as the memory where the CPU has no instructions for bf16.
    """
    program, rows = Program(Memory()), x.detach().float().contiguous()
    out = torch.empty(*x.shape[:-1], w.shape[0])
    program.rows(rows.data_ptr(), w, out.data_ptr(), program.floats(bias), rows.numel() // w.shape[1])
    program.run(threads.count())
    return out.to(x.dtype)


def linear(w: QTensor, T: int = 1) -> int:
    """The address of the compiled product of T rows with `w`."""
    way = products.integer_way()
    return loops().linear(w.bits, w.group_size, products.together(T), way, products.wide()).address


def prepare(w: QTensor, T: int = 1) -> int:
    """The address of the compiled preparation of T rows of activations for `w`."""
    return loops().prepare(w.bits, products.together(T), products.integer_way()).address


def blocks(w: QTensor) -> int:
    """Blocks of outputs of a product."""
    return -(-w.shape[0] // BLOCK)


def loops() -> ModuleType:
    """The compiled loops; the caller knows that they exist."""
    return products.loops()


def stages() -> ModuleType:
    """The compiled stages, imported with the first program: this takes numba a while."""
    from mixoff.kernels.cpu import stages

    return stages


def fields() -> int:
    """Numbers per job."""
    return len(loops().JOB)

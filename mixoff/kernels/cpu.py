"""Products of rows with quantized weights on a CPU, straight from the packed codes: which compiled loop, which threads.

Letters: **T** rows of activations, **N** outputs, **K** inputs, **F** expert width.
Activations are quantized to int8, one scale a group; `exact` keeps them fp32. Each output is summed by one thread in
one order, so results do not depend on the number of threads.

Does not know experts or caches. Where numba is missing, `reference` computes instead.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable
from types import ModuleType

import torch

from mixoff.kernels import threads
from mixoff.quantize import BLOCK, QTensor

SHARED_ABOVE = 1 << 20  # weights times rows; less is done in the time that it takes to hand it over
FP32_ROWS = {2: 128, 3: 64, 4: 128, 8: 128}  # fp32 activations: for more rows dequantizing once is faster


@functools.cache
def loops() -> ModuleType | None:
    """The compiled loops; None where numba is not installed, or the CPU has no fused multiply-add."""
    try:
        from mixoff.kernels import loops
    except ImportError:
        return None
    return loops if integer_way() else None


@functools.cache
def integer_way(features: frozenset[str] | None = None, machine: str | None = None) -> str | None:
    """How a CPU multiplies bytes: `vnni`, `avx2` or `any` (see `simd`); by default, the CPU that numba compiles for.

    >>> integer_way(frozenset({"fma", "avx2"}), "x86_64"), integer_way(frozenset(), "aarch64")
    ('avx2', 'any')
    """
    features, machine = (features, machine) if features is not None else target()
    if machine.startswith(("x86", "i386", "i686", "amd64")):
        if not {"fma", "avx2"} <= features:
            return None
        return "vnni" if "avxvnni" in features or {"avx512vnni", "avx512vl"} <= features else "avx2"
    return "any"


@functools.cache
def wide() -> int:
    """Outputs of a vector: those of 512 bits where the CPU has them, with VNNI, else of 256."""
    features, simd = target()[0], loops().simd
    return simd.WIDE if {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= features else simd.LANES


def target() -> tuple[frozenset[str], str]:
    """Features and architecture of what numba compiles for, which environment variables may set."""
    from numba.core.registry import cpu_target

    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(f[1:] for f in features.split(",") if f.startswith("+")), triple.split("-")[0].lower()


def serves(x: torch.Tensor, w: QTensor) -> bool:
    """Whether this module can compute `x @ w.T`: decided by form, device, CPU and numba's presence alone."""
    return w.metadata_bits == 8 and x.device.type == "cpu" and loops() is not None


def linear(x: torch.Tensor, w: QTensor, exact: bool = False) -> torch.Tensor:
    """`x @ w.T` for x (T, K) and w (N, K), in x's dtype -> (T, N); `serves(x, w)` must hold."""
    return _product(x.float().contiguous(), False, w, exact).to(x.dtype)


def gated(h: torch.Tensor, w: QTensor, exact: bool = False) -> torch.Tensor:
    """`(silu(gate) * up) @ w.T` for h (T, 2F), fp32, gate in its first half, and w (N, F) -> fp32 (T, N)."""
    return _product(h, True, w, exact)


def _product(x: torch.Tensor, gate: bool, w: QTensor, exact: bool) -> torch.Tensor:
    T, (N, K) = x.shape[0], w.shape
    assert x.shape[1] == K * (1 + gate) and x.is_contiguous()  # what is compiled takes addresses, and looks at nothing
    rows, way = 1 if T == 1 else 2 if T == 2 else 4, "float" if exact else integer_way()
    prepare, run = loops().prepare(w.bits, rows, way), loops().linear(w.bits, w.group_size, rows, way, wide())
    out, image, size = torch.empty(T, N), w.image, w.group_size
    padded, item = -(-T // rows) * rows, 4 if exact else 1
    room = torch.empty(padded * (K * item + 8 * K // size) + 64, dtype=torch.uint8)
    scales = room.data_ptr() + -(-padded * K * item // 8) * 8
    buffers = room.data_ptr(), scales, scales + 4 * padded * K // size
    numbers = (x.data_ptr(), gate, T, padded, K, *buffers, image.data_ptr(), len(image), N, size, out.data_ptr())
    job = array("q", numbers)  # as `loops.JOB` says
    count = -(-N // BLOCK)
    threads.compute(prepare.address, run.address, job.buffer_info()[0], count, parties(count, N * K * T))
    return out


def parties(count: int, size: int) -> int:
    """Threads for `count` blocks: `threads.count()` where `size`, weights times rows, is worth it."""
    return min(threads.count(), count) if size > SHARED_ABOVE else 1


def share(work: Callable[[int, int], object], count: int, size: int) -> None:
    """Call `work(first, last)` on ranges of 0..count, in so many threads as `parties` says."""
    if (number := parties(count, size)) == 1:
        work(0, count)
    else:
        threads.crew(number).share(work, count)


def dense(x: torch.Tensor, w: QTensor) -> torch.Tensor:
    """`x @ w.T` by way of weights, each block of outputs dequantized once: the bits of the reference."""
    image, size, run = w.image.numpy(), w.group_size, loops().dequantizer(w.bits)
    out = x.new_empty(x.shape[0], w.shape[0])  # (T, N)
    for start, stop in w.blocks():
        block = torch.empty(w.shape[1], stop - start)  # (K, B)
        run(image, w.shape[0], size, start, block.numpy())
        torch.mm(x, block.to(x.dtype), out=out[:, start:stop])
    return out

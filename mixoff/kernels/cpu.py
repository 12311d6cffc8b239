"""Products of rows with quantized weights on a CPU, straight from the packed codes: which compiled loop, which threads.

Letters: **T** rows of activations, **N** outputs, **K** inputs, **F** expert width.
Activations are quantized to int8, one scale a group; `exact` keeps them fp32. Each output is summed by one thread in
one order, so results do not depend on the number of threads.

Does not know experts or caches. Where numba is missing, `reference` computes instead.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from mixoff.kernels import threads
from mixoff.quantize import BLOCK, QTensor

LINE = 64  # bytes of a cache line
SHARED_ABOVE = 1 << 20  # weights times rows; less is done in the time that it takes to hand it over
KINDS = {torch.float32: 0, torch.bfloat16: 1}  # what compiled code reads and writes
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
    return _products(x, [w], exact)


def gated_mlp(x: torch.Tensor, gate_up: QTensor, down: QTensor, exact: bool = False) -> torch.Tensor:
    """`(silu(gate) * up) @ down.T`, gate and up the halves of `x @ gate_up.T`, in one go -> (T, N), in x's dtype.

    x (T, K), gate_up (2F, K), down (N, F). What lies between stays fp32.
    """
    return _products(x, [gate_up, down], exact)


def _products(x: torch.Tensor, weights: Sequence[QTensor], exact: bool) -> torch.Tensor:
    """The product of rows x (T, K) with the first weight, then of its result, gated, with the next, in x's dtype.

    All is one call of compiled code: in between a token's weights have driven Python out of the caches.
    """
    T, rows = x.shape[0], (x if x.dtype in KINDS else x.float()).contiguous()
    out = rows.new_empty(T, weights[-1].shape[0])
    together, way, number = 1 if T == 1 else 2 if T == 2 else 4, "float" if exact else integer_way(), threads.count()
    padded, item = -(-T // together) * together, 4 if exact else 1
    room = torch.empty(sum(_room(T, padded, item, w) for w in weights), dtype=torch.uint8)
    jobs, stages, source, kind, end = array("q"), [], rows.data_ptr(), KINDS[rows.dtype], room.data_ptr()
    for i, w in enumerate(weights):
        (N, K), size, image, last = w.shape, w.group_size, w.image, i == len(weights) - 1
        assert K << (i > 0) == (weights[i - 1].shape[0] if i else x.shape[1])  # compiled code looks at nothing
        values, scales = end, end + -(-padded * K * item // LINE) * LINE
        sums = scales + 4 * padded * (K // size)
        end = sums + 4 * padded * (K // size)
        target, narrow = (out.data_ptr(), KINDS[out.dtype]) if last else (end, 0)
        where = values, scales, sums, image.data_ptr(), image.numel(), N, size, target, narrow
        jobs.extend((source, kind, int(i > 0), T, padded, K, *where))  # as `loops.JOB` says
        prepare, run = loops().prepare(w.bits, together, way), loops().linear(w.bits, size, together, way, wide())
        count = -(-N // BLOCK)
        stages.append((prepare.address, run.address, count, pieces(count, N * K * T, number)))
        source, kind, end = target, 0, end + 4 * T * N
    threads.compute(stages, jobs, number)
    return out.to(x.dtype)


def _room(T: int, padded: int, item: int, w: QTensor) -> int:
    """Bytes for activations as a product with `w` takes them, and for its result."""
    (N, K), size = w.shape, w.group_size
    return padded * (K * item + 8 * (K // size)) + LINE + 4 * T * N


def pieces(count: int, size: int, number: int) -> int:
    """Pieces of `count` blocks for `number` threads: one where `size`, weights times rows, is not worth sharing."""
    return min(count, threads.PIECES * number) if number > 1 and size > SHARED_ABOVE else 1


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

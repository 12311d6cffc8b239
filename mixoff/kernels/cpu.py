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
    return linears(x, (w,), exact)[0]


def linears(x: torch.Tensor, weights: Sequence[QTensor], exact: bool = False) -> list[torch.Tensor]:
    """`linear` for each of `weights`, in one go."""
    rows = _rows(x)
    outs = [rows.new_empty(len(x), w.shape[0]) for w in weights]
    _run(len(x), exact, [(rows, w, out) for w, out in zip(weights, outs, strict=True)])
    return [out.to(x.dtype) for out in outs]


def gated_mlp(x: torch.Tensor, gate_up: QTensor, down: QTensor, exact: bool = False) -> torch.Tensor:
    """`(silu(gate) * up) @ down.T`, gate and up the halves of `x @ gate_up.T`, in one go -> (T, N), in x's dtype.

    x (T, K), gate_up (2F, K), down (N, F). What lies between stays fp32.
    """
    rows = _rows(x)
    out = rows.new_empty(len(x), down.shape[0])
    _run(len(x), exact, [(rows, gate_up, None), (None, down, out)])
    return out.to(x.dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` as compiled code reads it."""
    return (x if x.dtype in KINDS else x.float()).contiguous()


Step = tuple[torch.Tensor | None, QTensor, torch.Tensor | None]


def _run(T: int, exact: bool, steps: Sequence[Step]) -> None:
    """Products one after the other, each of T rows of activations with a weight, into a tensor, by one call.

    Activations of None are the result of the step before, gated; a step with no tensor leaves its result to the next.
    """
    rows, way = 1 if T == 1 else 2 if T == 2 else 4, "float" if exact else integer_way()
    padded, compiled, number = -(-T // rows) * rows, loops(), threads.count()
    room = torch.empty(sum(_room(padded, exact, step) for step in steps), dtype=torch.uint8)
    jobs, stages, end, before = array("q"), [], room.data_ptr(), (None, None, None)
    for x, w, out in steps:
        (N, K), size, bits, image = w.shape, w.group_size, w.bits, w.image
        source, gate, kind = (
            (x.data_ptr(), 0, KINDS[x.dtype]) if x is not None else (before[1], 1, KINDS[torch.float32])
        )
        prepared = before[2] if before[0] == (source, bits, size) else None
        values = prepared or end
        scales = values + -(-padded * K * (4 if exact else 1) // 64) * 64
        sums = scales + 4 * padded * K // size
        end = end if prepared else sums + 4 * padded * K // size
        target = end if out is None else out.data_ptr()
        end += 4 * T * N if out is None else 0
        narrow = 0 if out is None else KINDS[out.dtype]
        jobs.extend((source, kind, gate, T, padded, K, values, scales, sums, image.data_ptr(), image.numel(), N, size,
                     target, narrow))  # fmt: skip
        count = -(-N // BLOCK)
        pieces = min(count, threads.PIECES * number) if number > 1 and N * K * T > SHARED_ABOVE else 1
        prepare = 0 if prepared else compiled.prepare(bits, rows, way).address
        stages.append((prepare, compiled.linear(bits, size, rows, way, wide()).address, count, pieces))
        before = (source, bits, size), target, values
    threads.compute(stages, jobs, number)


def _room(padded: int, exact: bool, step: Step) -> int:
    """Bytes that a step needs beside its weight and result: prepared activations, and a result that is passed on."""
    (N, K), size = step[1].shape, step[1].group_size
    return padded * K * (4 if exact else 1) + 64 + 8 * padded * K // size + (4 * padded * N if step[2] is None else 0)


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

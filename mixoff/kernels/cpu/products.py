"""Products of rows with quantized weights on a CPU, straight from the packed codes: which compiled loop, which threads.

Letters: **T** rows of activations, **N** outputs, **K** inputs, **F** expert width.
Activations are quantized to int8, one scale per group; `exact` keeps them fp32. Each output is summed by one thread in
one order, so results do not depend on the number of threads. Where numba is missing, `reference` computes instead.
"""

from __future__ import annotations

import functools
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mixoff.kernels.cpu import threads
from mixoff.pages import LINE
from mixoff.quantize.layout import BLOCK
from mixoff.quantize.tensor import QTensor

ROOM = 1 << 20  # bytes that a thread keeps for intermediate values, enough for one token of an expert
SHARED_ABOVE = 1 << 20  # weights times rows; smaller products take less time than handing them over
PLANNED_ROWS, PLANS = 8, 32  # rows up to which a plan is kept, and plans per weight
X, OUT = 0, -2  # indices of fields in a job (`loops.JOB`)
STAGE = 4  # numbers per stage of `relay`
KINDS = {torch.float32: 0, torch.bfloat16: 1}  # what compiled code reads and writes
FP32_ROWS = {2: 128, 3: 64, 4: 128, 8: 128}  # fp32 activations: for more rows dequantizing once is faster


@functools.cache
def loops() -> Any:
    """The compiled loops; None where numba is not installed, or the CPU has no fused multiply-add."""
    try:
        from mixoff.kernels.cpu import loops
    except ImportError:
        return None
    return loops if integer_way() else None


@functools.cache
def integer_way(features: frozenset[str] | None = None, machine: str | None = None) -> str | None:
    """How a CPU multiplies bytes: `vnni`, `avx2` or `any` (see `simd`); by default, the CPU that numba compiles for.

    >>> integer_way(frozenset({"fma", "avx2"}), "x86_64"), integer_way(frozenset(), "aarch64")
    ('avx2', 'any')
    """
    if features is None or machine is None:
        features, machine = target()
    if machine.startswith(("x86", "i386", "i686", "amd64")):
        if not {"fma", "avx2"} <= features:
            return None
        return "vnni" if "avxvnni" in features or {"avx512vnni", "avx512vl"} <= features else "avx2"
    return "any"


@functools.cache
def wide() -> int:
    """Outputs per vector: of 512 bits if the CPU has them, with VNNI, else of 256."""
    features, simd = target()[0], loops().simd
    return simd.WIDE if {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= features else simd.LANES


def target() -> tuple[frozenset[str], str]:
    """Features and architecture of the CPU that numba compiles for, which environment variables may set."""
    from numba.core.registry import cpu_target

    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(f[1:] for f in features.split(",") if f.startswith("+")), triple.split("-")[0].lower()


def serves(x: torch.Tensor, w: QTensor) -> bool:
    """Whether this module can compute `x @ w.T`: decided by form, device, CPU and numba's presence alone."""
    return w.metadata_bits == 8 and x.is_cpu and loops() is not None


def linear(x: torch.Tensor, w: QTensor, exact: bool = False) -> torch.Tensor:
    """`x @ w.T` for x (..., K) and w (N, K), in x's dtype -> (..., N); `serves(x, w)` must hold."""
    return _products(x, ((w,),), exact, x.shape[:-1])


def gated_mlps(x: torch.Tensor, experts: Sequence[tuple[QTensor, QTensor]], exact: bool = False) -> torch.Tensor:
    """`(silu(gate) * up) @ down.T`, gate and up the halves of `x @ gate_up.T`, in x's dtype -> (E, ..., N).

    x (..., K), and gate_up (2F, K), down (N, F) of each of E experts, all in one form. Intermediate values are fp32.
    """
    return _products(x, experts, exact, (len(experts), *x.shape[:-1]))


def _products(x: torch.Tensor, chains: Sequence[tuple[QTensor, ...]], exact: bool, lead: Sequence[int]) -> torch.Tensor:
    """Chains of products: rows x (..., K) times the first weight, gated, times the next: (*lead, N) in x's dtype.

    All chains are one call of compiled code, planned once. A token's weights evict Python and PyTorch from the CPU's
    caches, so every Python operation here costs several times what it does in a tight loop.
    """
    rows = x if x.dtype in KINDS else x.float()
    rows = rows if rows.is_contiguous() else rows.contiguous()
    K, N = chains[0][0].shape[1], chains[0][-1].shape[0]
    assert x.shape[-1] == K  # compiled code checks nothing
    form = x.numel() // K, rows.dtype, exact, threads.count(), integer_way(), wide()
    plans = [_planned(chain, form) for chain in chains]
    out, stages, jobs = torch.empty((*lead, N), dtype=rows.dtype), array("q"), array("q")
    source, target, step = rows.data_ptr(), out.data_ptr(), out.nbytes // len(chains)
    for plan in plans:
        first = len(jobs)
        stages += plan.stages
        jobs += plan.jobs
        jobs[first + X], jobs[OUT] = source, target
        target += step
    threads.compute(stages.buffer_info()[0], len(stages) // STAGE, jobs.buffer_info()[0], plan.number)
    return out if out.dtype == x.dtype else out.to(x.dtype)


class _Plan(NamedTuple):
    """A prepared call. Each call fills in the addresses that the first job reads and the last one writes.

    - stages, jobs: arrays for `relay`.
    - number: number of threads.
    - room: memory for intermediate values; None uses the thread's own.
    """

    stages: array
    jobs: array
    number: int
    room: torch.Tensor | None


def _planned(weights: tuple[QTensor, ...], form: tuple) -> _Plan:
    """The plan for one weight or two, kept by the first."""
    key, plans = (_here.base, weights[-1], form), weights[0].plans
    plan = plans.get(key)
    if plan is None:
        plan = _plan(weights, form)
        if plan.room is None and form[0] <= PLANNED_ROWS:
            if len(plans) >= PLANS:  # plans of threads that have ended
                plans.clear()
            plans[key] = plan
    return plan


class _Here(threading.local):
    """Memory of each thread for intermediate values between two products."""

    def __init__(self) -> None:
        self.room = torch.empty(ROOM, dtype=torch.uint8)
        self.base = self.room.data_ptr()


_here = _Here()


def _plan(weights: tuple[QTensor, ...], form: tuple) -> _Plan:
    T, dtype, exact, number, way, vector = form
    rows = together(T)
    way = "float" if exact else way
    item = 4 if exact else 1  # bytes per prepared activation
    padded = padded_rows(T)
    narrow = KINDS[dtype]
    need = sum(_room(T, padded, item, w) for w in weights)
    room = torch.empty(need, dtype=torch.uint8) if need > ROOM else None
    end = _here.base if room is None else room.data_ptr()
    jobs, stages, source = array("q"), array("q"), 0
    for i, w in enumerate(weights):
        (N, K), size, first, last = w.shape, w.group_size, i == 0, i == len(weights) - 1
        assert first or weights[i - 1].shape[0] == 2 * K
        values, scales = end, end + -(-padded * K * item // LINE) * LINE
        sums = scales + 4 * padded * (K // size)
        result = sums + 4 * padded * (K // size)
        prepared = Prepared(values, scales, sums)
        jobs.extend(job_of(w, prepared, source, not first, result, T, kind=narrow * first, narrow=narrow * last))
        prepare, run = loops().prepare(w.bits, rows, way), loops().linear(w.bits, size, rows, way, vector)
        count = -(-N // BLOCK)
        stages.extend((prepare.address, run.address, count, pieces(count, N * K * T)))
        source, end = result, result + 4 * T * N
    return _Plan(stages, jobs, number, room)


class Prepared(NamedTuple):
    """Addresses of activations as a product takes them: values, scales and sums of their groups."""

    values: int
    scales: int
    sums: int


def job_of(
    w: QTensor,
    prepared: Prepared,
    x: int = 0,
    gate: bool = False,
    out: int = 0,
    T: int = 1,
    kind: int = 0,
    narrow: int = 0,
) -> list[int]:
    """The fields of a product with T rows of activations (`loops.JOB`)."""
    (N, K), values = w.shape, prepared._asdict()
    values |= {"x": x, "kind": kind, "gate": gate, "rotated": w.rotated, "T": T, "padded": padded_rows(T), "K": K}
    values |= {"image": w.image.data_ptr(), "nbytes": w.image.numel(), "N": N, "size": w.group_size}
    values |= {"out": out, "narrow": narrow}
    return [int(values[name]) for name in loops().JOB]


def together(T: int) -> int:
    """Rows that are multiplied side by side, of T."""
    return T if T in (1, 2) else 4


def padded_rows(T: int) -> int:
    """Rows of prepared activations for T rows: whole sets of those that are multiplied side by side."""
    return -(-T // together(T)) * together(T)


def _room(T: int, padded: int, item: int, w: QTensor) -> int:
    """Bytes for prepared activations of a product with `w`, and for its result."""
    (N, K), size = w.shape, w.group_size
    return padded * (K * item + 8 * (K // size)) + LINE + 4 * T * N


def pieces(count: int, size: int) -> int:
    """Pieces into which `count` blocks are divided: 1 for one thread, else several per thread."""
    return 1 if parties(count, size) == 1 else min(count, threads.PIECES * threads.count())


def parties(count: int, size: int) -> int:
    """Threads for `count` blocks: `threads.count()` if `size`, weights times rows, is large enough, else 1."""
    return min(threads.count(), count) if size > SHARED_ABOVE else 1


def share(work: Callable[[int, int], object], count: int, size: int) -> None:
    """Call `work(first, last)` on ranges of 0..count, in `parties` threads."""
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

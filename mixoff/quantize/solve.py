"""Solvers that turn weights into 2, 3, 4 or 8 bits, in the order in which they are stored.

Letters: **N** outputs (rows), **K** inputs (columns), **G** group size. A group is G neighbours in one row that share
a scale and a zero: `w = (q - zero) * scale`, q a whole number. Stored are the scale and the minimum, `-zero * scale`.

All parts are in one order (K-major), from which kernels compute without repacking:

- Blocks of 128 outputs. In a block, inputs ascend; for each input, the outputs of the block are next to each other.
- A 32-bit word holds 16, 8 or 4 neighbouring inputs of one output, the first in its lowest bits.
- The high bits of 3-bit codes are stored separately, 16 per 16-bit word.
- 128 consecutive groups share a grid for their 8-bit metadata (a super-group; the last one may be shorter).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mixoff.errors import MixoffError
from mixoff.quantize.layout import (
    BETA,
    DEFAULT_SOLVER,
    ITERATIONS,
    LARGEST,
    LP_NORM,
    RESOLUTION,
    ROUND,
    SHRINK_ABOVE,
    SLICE,
    SMALLEST_SCALE,
    SOLVERS,
    SUPER,
    WIDTH,
    pack,
    zero_point,
)
from mixoff.quantize.tensor import QTensor


def to_grid(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Base and span, fp16 (super-groups,), and codes, uint8 (groups,): values (groups,) ~ base + code * span / 256.

    The span is stored rather than span / 256, which fp16 would round to zero for small weights.
    """
    rows = torch.cat([values, values[-1:].expand(-len(values) % SUPER)]).view(-1, SUPER)
    base = rows.amin(1).half() + 0.0  # no -0.0, whose sign depends on the order of comparisons
    span = ((rows.amax(1) - base) * (256 / 255)).clamp_min(0).half() + 0.0
    per_value = torch.where(span > 0, 256 / span.float(), 0.0)
    codes = ((rows - base[:, None]) * per_value[:, None]).round().clamp(0, 255)
    return base, span, codes.flatten()[: len(values)].to(torch.uint8)


def keep_zeros(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Metadata (groups,) in which groups of zeros, marked by scale 0, stay exactly zero on the super-groups' grids.

    Such a group works with any scale, so it gets the smallest scale of its super-group. But its minimum must be 0:
    minima above zero in its super-group are lowered to zero, which makes zero the top of the grid.
    """
    padding = -len(scale) % SUPER
    scales = torch.nn.functional.pad(scale, (0, padding), value=math.inf).view(-1, SUPER)
    minima = torch.nn.functional.pad(minimum, (0, padding)).view(-1, SUPER)
    zeros = scales == 0
    least = scales.masked_fill(zeros, math.inf).amin(1, keepdim=True).nan_to_num(posinf=0)
    minima = torch.where(zeros.any(1, keepdim=True), minima.clamp_max(0), minima)
    return torch.where(zeros, least, scales).flatten()[: len(scale)], minima.flatten()[: len(scale)]


def store_metadata(q: QTensor, start: int, stop: int, scale: Tensor, minimum: Tensor) -> None:
    """Write scale and minimum, fp32 (rows, K/G), of one block into `q`, in its `metadata_bits`."""
    groups = q.shape[1] // q.group_size
    items = slice(start * groups, stop * groups)
    scale, minimum = scale.T.flatten(), minimum.T.flatten()
    if q.metadata_bits == 16:
        q.parts["scale"][items], q.parts["minimum"][items] = scale.half() + 0.0, minimum.half() + 0.0
        return
    scale, minimum = keep_zeros(scale, minimum)
    grids = slice(items.start // SUPER, -(-items.stop // SUPER))
    q.parts["scale_base"][grids], q.parts["scale_span"][grids], q.parts["scale_codes"][items] = to_grid(scale)
    base, q.parts["min_span"][grids], q.parts["min_codes"][items] = to_grid(-minimum)
    q.parts["min_top"][grids] = 0.0 - base


# Quantizing -----------------------------------------------------------------------------------------------------------


def quantize(
    w: Tensor,
    bits: int = 2,
    group_size: int = 32,
    solver: str = DEFAULT_SOLVER,
    metadata_bits: int = 8,
    each: Callable = map,
) -> QTensor:
    """Quantize a matrix (N, K), fp32, fp16 or bf16, in groups along its inputs.

    - w: the matrix.
    - bits: bits per code: 2, 3, 4 or 8.
    - group_size: weights that share a scale and a minimum; it must divide K.
    - solver: way to choose scale and minimum, see below.
    - metadata_bits: bits of each scale and minimum, 8 or 16.
    - each: `map`, or a thread pool's `map`, over blocks of 128 rows; a block takes one thread, and not the GIL.

    Solvers:

    - `rtn` rounds to the grid between the smallest and the largest weight of each group.
    - `hqq` also shifts that grid (half-quadratic quantization, Badri and Shaji 2023, mobiusml.github.io/hqq_blog).
    - `lsq` fits scale and minimum by least squares, then stretches each row to unit gain: `row @ row_hat == row @ row`.

    Codes are rounded against the metadata as stored. Groups of zeros stay exactly zero; other constant groups are as
    exact as the metadata. The result is on `w`'s device, and the same bit for bit with any number of threads, with or
    without numba. Scratch memory stays below a tenth of a matrix of 4096 rows.

    Raises MixoffError for a group size that does not divide K, for NaN, and for |w| above 8192.
    Tested against the hqq package (relative error within 1 %) and brute force.

    >>> quantize(torch.linspace(-1, 1, 256).view(4, 64), bits=4, group_size=64, metadata_bits=16)
    QTensor(4x64, 4-bit g64, 4.500 bits/weight, 144 B)
    """
    if not isinstance(w, Tensor) or w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise MixoffError(f"weights are fp32, fp16 or bf16 tensors, not {getattr(w, 'dtype', type(w).__name__)}")
    if solver not in SOLVERS:
        raise MixoffError(f"no solver {solver!r}: choose one of {', '.join(SOLVERS)}")
    q = QTensor.empty(tuple(w.shape), bits, group_size, metadata_bits)
    for _ in each(lambda rows: quantize_block(w.detach(), q, rows[0], rows[1], solver), q.blocks()):
        pass
    return q.to(w.device)


def quantize_block(w: Tensor, q: QTensor, start: int, stop: int, solver: str) -> None:
    """Solve, store and pack rows start..stop of `w` (N, K) into `q`. Blocks share no bytes, so any order will do."""
    if compiled := loops():
        w = widened(w[start:stop], q.group_size)
        arrays = w.flatten(0, 1).numpy(), SOLVERS.index(solver), q.bits, *block_arrays(q, start, stop)
        if not compiled.compiled()(*arrays):
            check_range(w)
    else:
        quantize_block_torch(w[start:stop], q, start, stop, solver)


def block_arrays(q: QTensor, start: int, stop: int) -> tuple:
    """Views of a block's parts, in the order of `solve_numba.compiled`; parts that `q` does not have are empty."""
    groups, none = q.shape[1] // q.group_size, torch.empty(0, 0, dtype=torch.int16)
    items = slice(start * groups, stop * groups)
    ranges = dict.fromkeys(q.parts, slice(items.start // SUPER, -(-items.stop // SUPER)))
    ranges |= dict.fromkeys(("scale", "minimum", "scale_codes", "min_codes"), items)

    def parts(dtype: torch.dtype, *names: str) -> tuple[np.ndarray, ...]:
        views = (q.parts[name][ranges[name]] if name in q.parts else none.flatten() for name in names)
        return tuple(view.view(dtype).numpy() for view in views)

    high = q.block("high", start, stop) if q.bits == 3 else none
    wide = parts(torch.int16, "scale", "minimum")
    grids = parts(torch.int16, "scale_base", "scale_span", "min_top", "min_span")
    return (
        q.block("codes", start, stop).numpy(),
        high.numpy(),
        wide,
        grids,
        parts(torch.uint8, "scale_codes", "min_codes"),
    )


def quantize_block_torch(w: Tensor, q: QTensor, start: int, stop: int, solver: str) -> None:
    """`quantize_block` without numba, for rows `w` (rows, K)."""
    top, step = 2**q.bits - 1, max(1, SLICE // q.shape[1])
    slices = [slice(row, min(row + step, stop - start)) for row in range(0, stop - start, step)]
    solved = torch.empty(4, stop - start, q.shape[1] // q.group_size)
    for rows in slices:
        solved[:, rows] = torch.stack(solve(widened(w[rows], q.group_size), top, solver))
    scale, minimum, energy, overlap = solved
    gain = torch.where(fold(overlap) > 0, fold(energy) / fold(overlap), 1.0).clamp(1, 2)[:, None]  # (rows, 1)
    store_metadata(q, start, stop, scale * gain, minimum * gain)
    scale, minimum = (stored.T for stored in q._metadata(start, stop))  # (rows, K/G)
    factor, zero = torch.where(scale > 0, gain / scale, 0.0), zero_point(scale, minimum)
    for rows in slices:
        copy = widened(w[rows], q.group_size)
        codes = nearest_codes(copy.mul_(factor[rows][..., None]).add_(zero[rows][..., None]), top)
        store_codes(q, start, stop, rows, codes.int().flatten(1))


def widened(w: Tensor, group_size: int) -> Tensor:
    """An fp32 copy (rows, K/G, G) of some rows (rows, K)."""
    copy = torch.empty(w.shape)
    for rows in zip(copy.split(few := max(1, SLICE // w.shape[1])), w.split(few), strict=True):
        rows[0].copy_(rows[1])
    return copy.unflatten(1, (-1, group_size))


def store_codes(q: QTensor, start: int, stop: int, rows: slice, codes: Tensor) -> None:
    """Pack the codes, int32 (rows, K), of some rows of a block into `q`."""
    width = WIDTH[q.bits]
    q.block("codes", start, stop)[:, rows] = pack(codes & (2**width - 1), width, 32 // width)
    if q.bits == 3:
        q.block("high", start, stop)[:, rows] = pack(codes >> 2, 1, 16).to(torch.int16)


def solve(w: Tensor, top: int, solver: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, minimum, energy and overlap, each (rows, K/G), of groups `w` (rows, K/G, G) for codes 0..top.

    Energy is the sum of w * w, and overlap that of w times its approximation. A row's gain is the ratio of its totals;
    solvers that do not stretch rows return ones.
    """
    check_range(w)
    low, high = w.amin(-1), w.amax(-1)
    largest = torch.maximum(-low, high)
    floor = (largest * RESOLUTION).clamp_min(SMALLEST_SCALE)
    scale, minimum = torch.maximum((high - low) / top, floor), low.clone()
    energy, overlap = torch.ones_like(scale), torch.ones_like(scale)
    if solver == "hqq":
        zero = -low / scale
        refine_torch(w, 1 / scale, high - low > SHRINK_ABOVE, top, zero)
        minimum = -zero * scale
    elif solver == "lsq":
        fit_torch(w, top, scale, minimum, energy, overlap)
        scale = torch.maximum(scale, floor)
    constant = low == high  # then |c| is the scale and the code 0 or 1; the scale 0 marks a group of zeros
    scale, minimum = torch.where(constant, largest, scale), torch.where(constant, low.clamp_max(0), minimum)
    return scale, minimum, energy, overlap


def check_range(w: Tensor) -> None:
    """Raise MixoffError for NaN, infinity, and weights beyond the range of fp16 metadata."""
    low, high = torch.aminmax(w)
    if not (largest := torch.maximum(-low, high)) <= LARGEST:
        value = f"{largest:.4g}, above {LARGEST:.0f}" if largest.isfinite() else "NaN or infinity"
        raise MixoffError(f"the weights hold {value}: repair or rescale the checkpoint")


def is_finite(w: Tensor) -> bool:
    """Whether fp32, fp16 or bf16 weights hold neither NaN nor infinity.

    Only NaN's bits, read as whole numbers, are above those of infinity of the same sign. So two maxima suffice: over
    signed integers for positive numbers, over unsigned ones for negative. That takes no memory and less time than
    hashing the bytes.
    """
    signed, unsigned = (np.int32, np.uint32) if w.dtype == torch.float32 else (np.int16, np.uint16)
    infinity = torch.tensor([math.inf, -math.inf], dtype=w.dtype).view(getattr(torch, signed.__name__)).numpy()
    bits = w.detach().contiguous().view(getattr(torch, signed.__name__)).numpy()
    return not bits.size or bool(bits.max() < infinity[0] and bits.view(unsigned).max() < infinity.view(unsigned)[1])


# Inner loops in torch; `solve_numba` has them compiled, with equal results --------------------------------------------


@functools.cache
def loops() -> ModuleType | None:
    """The compiled solvers; None if numba is not installed."""
    try:
        from mixoff.quantize import solve_numba
    except ImportError:
        return None
    return solve_numba


def fold(values: Tensor) -> Tensor:
    """Sum over the last dimension by adding its halves: the same bits on every machine and in any batch."""
    while (width := values.shape[-1]) > 1:
        if width % 2:
            values = torch.nn.functional.pad(values, (0, 1))
        values = values[..., : (width + 1) // 2] + values[..., (width + 1) // 2 :]
    return values[..., 0]


def nearest_codes(x: Tensor, top: int) -> Tensor:
    """`x` clamped to 0..top and rounded half to even, in place."""
    return x.clamp_(0, top).add_(float(ROUND)).sub_(float(ROUND))


def refine_torch(w: Tensor, inverse: Tensor, wide: Tensor, top: int, zero: Tensor) -> None:
    """HQQ on groups w (..., G): alternate codes and `zero` (...) until they converge.

    The best zero for given codes is `mean(q - (w - e) / scale)`, where e are the errors after l_p shrinkage. No error
    exceeds its group's range, so e is 0 in groups that are not marked `wide`. `inverse` is 1 / scale.
    """
    share = 1 / w.shape[-1]
    mean = fold(w) / w.shape[-1]
    shrunk = torch.zeros(())
    for _ in range(ITERATIONS):
        q = nearest_codes((w * inverse[..., None]).add_(zero[..., None]), top)
        if wide.any():
            e = (w - (q - zero[..., None]) / inverse[..., None]).double()
            size = e.abs()
            shrunk = fold(
                (size - size ** (LP_NORM - 1) / BETA).masked_fill_(size <= SHRINK_ABOVE, 0) * e.sign()
            ).float()
        settled = zero.clone()
        zero.copy_(q.sum(-1) * share - (mean - shrunk * share) * inverse)
        if torch.equal(zero, settled):
            break


def fit_torch(w: Tensor, top: int, scale: Tensor, minimum: Tensor, energy: Tensor, overlap: Tensor) -> None:
    """Least squares on groups w (..., G): alternate codes and the line `scale * q + minimum` through (q, w).

    All others are (...) and are overwritten: `energy` by the sum of w * w, `overlap` by that of w * approximation.
    """
    size, mean = w.shape[-1], fold(w) / w.shape[-1]
    for _ in range(ITERATIONS):
        q = nearest_codes((w - minimum[..., None]).mul_((1 / scale)[..., None]), top)
        covariance, total = fold(q * (w - mean[..., None])), q.sum(-1)
        spread = size * (q * q).sum(-1).int() - total.int() ** 2
        before = scale.clone(), minimum.clone()
        scale.copy_(torch.where(spread > 0, size * covariance / spread.float(), scale))
        minimum.copy_(mean - scale * (total / size))
        if torch.equal(scale, before[0]) and torch.equal(minimum, before[1]):
            break
    energy.copy_(fold(w * w))
    overlap.copy_(scale * (covariance + total * mean) + minimum * (size * mean))

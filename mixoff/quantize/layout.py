"""Where each bit of a quantized matrix is: formats, packing, sizes."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixoff.errors import MixoffError

BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128)
METADATA_BITS = (8, 16)
SOLVERS = ("rtn", "hqq", "lsq")
DEFAULT_SOLVER = "lsq"  # the winner at 2 and 4 bits in docs/quantization.md
FORMAT = "mixoff-qtensor-1"

BLOCK = 128  # outputs whose codes are next to each other
SUPER = 128  # groups on one metadata grid
HUGE_PAGE = 2 << 20  # bytes
WIDTH = {2: 2, 3: 2, 4: 4, 8: 8}  # bits of a code in the part `codes`; the third bit of 3-bit codes is in `high`
LARGEST = 8192.0  # |w| up to which every stored number stays below fp16's 65504
SMALLEST_SCALE = 2.0**-24  # the smallest fp16 number above zero
RESOLUTION = 2.0**-12  # of an fp16 minimum, relative: a finer scale would gain nothing
SLICE = 2**15 - 1  # weights processed at a time: they stay in cache, and from 2**15 on torch would use several threads
ITERATIONS = 20  # hqq 0.2.8's default; groups settle after three to five
LP_NORM, BETA = 0.7, 10.0  # hqq 0.2.8's defaults
SHRINK_ABOVE = BETA ** (-1 / (2 - LP_NORM))  # the l_p shrinkage sets errors below this, 0.170, to zero
ROUND = np.float32(1.5 * 2**23)  # x + ROUND - ROUND rounds |x| < 2**22 half to even, in torch and numba alike


# Storage --------------------------------------------------------------------------------------------------------------


def check_format(shape: tuple[int, ...], bits: int, group_size: int, metadata_bits: int) -> None:
    """Raise MixoffError, with the way out, unless a matrix of this shape can be stored in this format."""
    choices = {
        "bits": (bits, BITS),
        "group_size": (group_size, GROUP_SIZES),
        "metadata_bits": (metadata_bits, METADATA_BITS),
    }
    for name, (value, allowed) in choices.items():
        if type(value) is not int or value not in allowed:
            raise MixoffError(f"{name} is {value!r}: choose one of {', '.join(map(str, allowed))}")
    if len(shape) != 2 or any(type(size) is not int or size < 1 for size in shape):
        raise MixoffError(
            f"only matrices are quantized, not shape {tuple(shape)}: pass one (outputs, inputs) slice at a time"
        )
    if shape[1] % group_size:
        dividing = " or ".join(str(size) for size in GROUP_SIZES if shape[1] % size == 0)
        advice = f"use {dividing}" if dividing else f"nor does any of {GROUP_SIZES}: keep this matrix in 16 bits"
        raise MixoffError(f"a group of {group_size} does not divide the width {shape[1]}: {advice}")


def layout(
    shape: tuple[int, ...], bits: int, group_size: int, metadata_bits: int = 8
) -> list[tuple[str, tuple[int], torch.dtype]]:
    """Name, shape and dtype of each part of a quantized (N, K) matrix, in the order of its byte image.

    >>> [(name, *size) for name, size, _ in layout((256, 64), bits=2, group_size=32)]  # doctest: +NORMALIZE_WHITESPACE
    [('codes', 1024), ('scale_base', 4), ('scale_span', 4), ('min_top', 4), ('min_span', 4),
     ('scale_codes', 512), ('min_codes', 512)]
    """
    check_format(shape, bits, group_size, metadata_bits)
    weights = shape[0] * shape[1]
    groups = weights // group_size
    parts = [("codes", weights * WIDTH[bits] // 32, torch.int32)]
    if bits == 3:
        parts.append(("high", weights // 16, torch.int16))
    if metadata_bits == 16:
        parts += [("scale", groups, torch.float16), ("minimum", groups, torch.float16)]
    else:
        grids = ("scale_base", "scale_span", "min_top", "min_span")
        parts += [(name, -(-groups // SUPER), torch.float16) for name in grids]
        parts += [("scale_codes", groups, torch.uint8), ("min_codes", groups, torch.uint8)]
    return [(name, (size,), dtype) for name, size, dtype in parts]


@functools.lru_cache(maxsize=256, typed=True)
def places(
    shape: tuple[int, ...], bits: int, group_size: int, metadata_bits: int
) -> dict[str, tuple[int, int, torch.dtype]]:
    """First byte, end and dtype of each part in the byte image."""
    ranges = {}
    start = 0
    for name, (size,), dtype in layout(shape, bits, group_size, metadata_bits):
        end = start + size * dtype.itemsize
        ranges[name] = start, end, dtype
        start = end
    return ranges


@functools.lru_cache(maxsize=256, typed=True)
def packed_nbytes(shape: tuple[int, ...], bits: int, group_size: int, metadata_bits: int = 8) -> int:
    """Bytes of a quantized (N, K) matrix, metadata included, from its shape alone.

    >>> 3 * packed_nbytes((14336, 4096), bits=2, group_size=32) / 2**20  # an expert of Mixtral-8x7B, MiB
    52.828125
    """
    return sum(size * dtype.itemsize for _, (size,), dtype in layout(shape, bits, group_size, metadata_bits))


def pack(codes: Tensor, width: int, per_word: int) -> Tensor:
    """Codes of `width` bits, int32 (rows, K), packed `per_word` per word, first code lowest: int32 (K/per_word, rows).

    >>> hex(pack(torch.tensor([[1, 2, 3, 0]] * 4).view(1, 16), width=2, per_word=16).item())
    '0x39393939'
    """
    shifts = torch.arange(0, per_word * width, width, dtype=torch.int32)
    return (codes.unflatten(1, (-1, per_word)) << shifts).sum(-1, dtype=torch.int32).T


def unpack(words: Tensor, width: int, per_word: int) -> Tensor:
    """The inverse of `pack`, inputs first: words (K/per_word, rows) into int32 (K, rows)."""
    shifts = torch.arange(0, per_word * width, width, dtype=torch.int32, device=words.device)
    return ((words.int()[:, None] >> shifts[:, None]) & (2**width - 1)).flatten(0, 1)


# Metadata -------------------------------------------------------------------------------------------------------------


def zero_point(scale: Tensor, minimum: Tensor) -> Tensor:
    """`-minimum / scale`, and 0 for a group whose scale is 0, because all its weights are 0."""
    return torch.where(scale > 0, -minimum / scale, 0.0)

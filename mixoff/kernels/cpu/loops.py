"""Products with quantized weights, compiled by numba: the loops over blocks, groups and rows around `simd.group`.

Letters: **T** rows of activations, **N** outputs, **K** inputs, **G** group size, **F** expert width.
Weights are read in place, from the byte image of a `QTensor`. Each output is summed by one thread, groups ascending,
so neither threads nor the number of rows in a call change a bit. Importing this module imports numba.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import carray
from numba.core.ccallback import CFunc
from numba.extending import overload, register_jitable

from mixoff.jit import function, jit
from mixoff.kernels.cpu import simd
from mixoff.kernels.cpu.relay import FIELDS
from mixoff.kernels.cpu.simd import BLOCK, LANES, TOP, WIDTH, group, pointer
from mixoff.pages import LINE
from mixoff.quantize import rotation

STAMP = hashlib.sha256(Path(simd.__file__).read_bytes()).hexdigest()  # in the cache key: numba misses changes there
SUPER = 128  # groups on one grid of metadata
LINES = 4 * BLOCK // LINE  # cache lines of a word of each output of a block
SMALLEST = np.float32(2.0**-100)  # a group of activations below it counts as zero: its scale would leave fp32's range
HALF, SPAN = np.float32(2.0**112), np.float32(2.0**104)  # what fp16's bits, moved to fp32's places, lack; over 256
ROUND = np.float32(1.5 * 2**23)  # x + ROUND - ROUND rounds |x| < 2**22 half to even
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP = tuple(map(np.float32, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)))
FIRST, SECOND = np.uint32(rotation.FIRST), np.uint32(rotation.SECOND)
QUARTER = np.float32(rotation.QUARTER)
MOST_EXP = np.float32(87)  # exp of more leaves fp32's range


# Fields of a product: addresses of arrays, and sizes.
# - x: activations (T, K), or (T, 2K) with `gate`, which stands for silu(first half) * second half
# - rotated: 1 if the weight's inputs are rotated, so that activations have to be
# - values: activations as the product takes them (padded, K); scales, sums: of their groups (padded, K / size)
# - image: byte image of the weight; out: results (T, N)
# - kind, narrow: 1 if x and out are bf16, else fp32
JOB = (
    "x", "kind", "gate", "rotated", "T", "padded", "K", "values", "scales", "sums",
    "image", "nbytes", "N", "size", "out", "narrow",
)  # fmt: skip
assert len(JOB) == FIELDS


@functools.cache
def prepare(bits: int, rows: int, way: str) -> CFunc:
    """Prepares activations for a product, T filled up to `padded`: a function of the address of a job."""
    stamp, kind = STAMP, np.float32 if way == "float" else np.int8

    def prepared(job, first, last):
        fields = carray(pointer(job, np.int64), (FIELDS,))
        x, narrow, gate, turned, T, padded, K, values, scales, sums, _, _, _, size, _, _ = fields
        shape = T, K + gate * K
        x = widened_rows(carray(pointer(x, np.uint16), shape)) if narrow else carray(pointer(x, np.float32), shape)
        x = silu_gate(x) if gate else x
        activations(
            way, rotated(x) if turned else x, size, bits, stamp, carray(pointer(values, kind), (padded, K)),
            carray(pointer(scales, np.float32), (padded, K // size)),
            carray(pointer(sums, np.float32), (padded, K // size)),
        )  # fmt: skip

    return function(prepared, "numpy")


@functools.cache
def linear(bits: int, size: int, rows: int, way: str, wide: int = LANES) -> CFunc:
    """The product with a weight: a function of the address of a job and of blocks of outputs first..last.

    - bits, size: bits per code, and group size.
    - rows: rows side by side, 1, 2 or 4.
    - way: instructions, as in `simd`.
    - wide: outputs per vector, 8 or 16; 16 for whole blocks with `vnni` or `float`.
    """
    stamp, kind = STAMP, np.float32 if way == "float" else np.int8

    def product_of(job, first, last):
        fields = carray(pointer(job, np.int64), (FIELDS,))
        _, _, _, _, T, padded, K, x, scales, sums, image, nbytes, N, _, out, narrow = fields
        product(
            bits, size, rows, way, wide, stamp, carray(pointer(x, kind), (padded, K)),
            carray(pointer(scales, np.float32), (padded, K // size)),
            carray(pointer(sums, np.float32), (padded, K // size)), carray(pointer(image, np.uint8), (nbytes,)),
            N, carray(pointer(out, np.float32), (T, N)), carray(pointer(out, np.uint16), (T, N)), narrow, first, last,
        )  # fmt: skip

    return function(product_of, "numpy")


@register_jitable
def widened_rows(x):
    """bf16 (T, K) as fp32."""
    bits = np.empty(x.shape, np.int32)
    for t in range(x.shape[0]):
        for k in range(x.shape[1]):
            bits[t, k] = np.int32(x[t, k]) << np.int32(16)
    return bits.view(np.float32)


@register_jitable
def to_bf16(value):
    """The bits of an fp32 number rounded to bf16, half to even."""
    if value != value:
        return np.uint16(0x7FC0)
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16))


# Activations ----------------------------------------------------------------------------------------------------------


@register_jitable
def silu_gate(h):
    """silu(gate) * up of h (T, 2F) -> (T, F); exp after Cephes' expf, in steps that LLVM turns into vectors."""
    T, F = h.shape[0], h.shape[1] // 2
    out, power, whole = np.empty((T, F), np.float32), np.empty(F, np.float32), np.empty(F, np.int32)
    factor = whole.view(np.float32)
    for t in range(T):
        for i in range(F):
            y = min(max(-h[t, i], -MOST_EXP), MOST_EXP)
            n = y * LOG2_E + ROUND - ROUND
            r = y - n * LN2_HIGH - n * LN2_LOW
            p = ((((EXP[0] * r + EXP[1]) * r + EXP[2]) * r + EXP[3]) * r + EXP[4]) * r + EXP[5]
            power[i] = p * (r * r) + r + np.float32(1)
            whole[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
        for i in range(F):
            gate = -MOST_EXP if h[t, i] < -MOST_EXP else h[t, i]  # written so that NaN stays NaN
            out[t, i] = gate / (np.float32(1) + power[i] * factor[i]) * h[t, F + i]
    return out


@register_jitable
def rotated(x):
    """x (T, K) times the rotation of `quantize.rotation`, with the same additions in the same order."""
    T, K = x.shape
    out = np.empty((T, K), np.float32)
    for t in range(T):
        for k in range(K):
            mixed = np.uint32(k) * FIRST
            mixed = (mixed ^ mixed >> np.uint32(15)) * SECOND
            out[t, k] = x[t, k] * (QUARTER if (mixed ^ mixed >> np.uint32(13)) & np.uint32(1) == 0 else -QUARTER)
    blocks = out.reshape(T * K // 16, 16)
    halves, quarters = np.empty(16, np.float32), np.empty(16, np.float32)
    for b in range(len(blocks)):
        for i in range(8):
            halves[i], halves[8 + i] = blocks[b, i] + blocks[b, 8 + i], blocks[b, i] - blocks[b, 8 + i]
        for i in range(4):
            quarters[i], quarters[4 + i] = halves[i] + halves[4 + i], halves[i] - halves[4 + i]
            quarters[8 + i], quarters[12 + i] = halves[8 + i] + halves[12 + i], halves[8 + i] - halves[12 + i]
        for i in range(0, 16, 4):
            even, odd = quarters[i] + quarters[i + 2], quarters[i + 1] + quarters[i + 3]
            blocks[b, i], blocks[b, i + 1] = even + odd, even - odd
            even, odd = quarters[i] - quarters[i + 2], quarters[i + 1] - quarters[i + 3]
            blocks[b, i + 2], blocks[b, i + 3] = even + odd, even - odd
    return out


def activations(way, x, size, bits, stamp, values, scales, sums):
    """Write activations as a product takes them: values, scales and sums of each group; zeros for rows beyond x."""


@overload(activations, prefer_literal=True)
def _activations(way, x, size, bits, stamp, values, scales, sums):
    per_byte = 8 // WIDTH[bits.literal_value]
    if way.literal_value == "float":
        return lambda way, x, size, bits, stamp, values, scales, sums: unquantized(x, size, values, scales, sums)
    return lambda way, x, size, bits, stamp, values, scales, sums: quantized(x, size, per_byte, values, scales, sums)


@register_jitable
def unquantized(x, size, values, scales, sums):
    T, K = x.shape
    scales[:], sums[:], values[T:] = 1, 0, 0
    for t in range(T):
        for k in range(K):
            values[t, k] = x[t, k]
        for g in range(K // size):
            for k in range(g * size, (g + 1) * size):
                sums[t, g] += x[t, k]


@register_jitable
def quantized(x, size, per_byte, codes, scales, sums):
    """Quantize to int8, symmetric, one scale per group. Every `per_byte`-th input goes into one 32-bit word.

    The sum of a group is that of its quantized values, so that their errors multiply `w` and not `w - minimum`.
    """
    T, K = x.shape
    codes[T:], scales[T:], sums[T:] = 0, 0, 0
    values, byte, eight = np.empty(K, np.int32), np.int32(255), np.int32(8)
    for t in range(T):
        row, bits, words = x[t], x[t].view(np.int32), codes[t].view(np.int32)
        for g in range(K // size):
            first = g * size
            most = np.int32(0)  # floats without sign order like their bits, which LLVM compares as vectors
            for k in range(size):
                most = max(most, bits[first + k] & np.int32(0x7FFFFFFF))
            largest = from_bits(most)
            inverse = np.float32(TOP) / largest if largest >= SMALLEST else np.float32(0)
            total = np.int32(0)
            for k in range(size):
                code = np.int32(row[first + k] * inverse + ROUND - ROUND)
                values[first + k] = code
                total += code
            scales[t, g] = largest / np.float32(TOP) if not largest < SMALLEST else np.float32(0)
            sums[t, g] = scales[t, g] * np.float32(total)
        for j in range(K // (4 * per_byte)):
            for i in range(per_byte):
                k, word = 4 * per_byte * j + i, np.int32(0)
                for b in range(3, -1, -1):
                    word = word << eight | values[k + b * per_byte] & byte
                words[per_byte * j + i] = word


@register_jitable
def address(array):
    """An array's address as a signed number: numba adds unsigned to signed numbers in floating point."""
    return np.int64(array.ctypes.data)


@register_jitable
def from_bits(value):
    """The fp32 number of these 32 bits."""
    return np.int32(value).view(np.float32)


# Products -------------------------------------------------------------------------------------------------------------


@register_jitable
def grids_of(image, start, count, first, used):
    """Metadata grids first..first + used of `count`, fp32 (4, used): base, span / 256, top, -span / 256.

    fp16 is widened by shifting bits, which every CPU can do.
    """
    halves = image[start : start + 8 * count].view(np.uint16)
    moved = np.empty((4, used), np.int32)
    out = moved.view(np.float32)
    for k in range(4):
        factor = HALF if k % 2 == 0 else SPAN if k == 1 else -SPAN
        for i in range(used):
            half = np.int32(halves[k * count + first + i])
            moved[k, i] = (half & np.int32(0x7FFF)) << np.int32(13) | (half & np.int32(0x8000)) << np.int32(16)
        for i in range(used):
            out[k, i] *= factor
    return out


@register_jitable
def widened(image, start, rows, nbytes, wide):
    """`rows` rows of `nbytes` bytes, each padded to `wide`: for a block with fewer outputs than a vector."""
    out = np.zeros((rows, wide), np.uint8)
    for i in range(rows):
        for k in range(nbytes):
            out[i, k] = image[start + i * nbytes + k]
    return out


def product(bits, size, rows, way, wide, stamp, x, scales, sums, image, N, out, out16, narrow, first, last):
    """Write the product of activations (T, K) and the weight in `image` to `out` (T, N), or to `out16` if `narrow`.

    `out16` is the same memory as bf16. In a whole block, the groups of an input share a grid, and vectors are `wide`.
    The last, shorter block takes LANES outputs at a time, each with its own grid; its last vector overlaps the one
    before.
    """


@overload(product, prefer_literal=True)
def _product(bits, size, rows, way, wide, stamp, x, scales, sums, image, N, out, out16, narrow, first, last):
    per_word = 32 // WIDTH[bits.literal_value]
    step, third = size.literal_value // per_word, int(bits.literal_value == 3)
    x_item = 4 if way.literal_value == "float" else 1

    def loop(bits, size, rows, way, wide, stamp, x, scales, sums, image, N, out, out16, narrow, first, last):
        T, K = x.shape
        groups, words = K // size, K // per_word
        items, high_at = N * groups, 4 * N * words
        count, grids_at = (items + SUPER - 1) // SUPER, high_at + third * (N * K // 8)
        base, scales_at = address(image), grids_at + 8 * count
        lanes, total = np.zeros((4, BLOCK), np.float32), np.empty(rows * BLOCK + LINE, np.float32)
        even = -address(total) % LINE // 4  # from where vectors of sums fill whole cache lines
        common, grids = np.empty(rows, np.float32), np.empty((4, 0), np.float32)
        for b in range(first, last):
            start = b * BLOCK
            n = min(BLOCK, N - start)
            item, beside = start * groups, n
            codes, high = base + 4 * start * words, base + high_at + start * K // 8
            scale_codes = base + scales_at + item
            min_codes = scale_codes + items
            grid = item // SUPER
            if n < BLOCK:
                grids = grids_of(image, grids_at, count, grid, (item + n * groups - 1) // SUPER - grid + 1)
            if n < LANES:
                beside = LANES
                codes8 = widened(image, 4 * start * words, words, 4 * n, 4 * LANES)
                high8 = widened(image, high_at + start * K // 8, third * (K // 16), 2 * n, 2 * LANES)
                scale8 = widened(image, scales_at + item, groups, n, LANES)
                min8 = widened(image, scales_at + items + item, groups, n, LANES)
                codes, high = address(codes8), address(high8)
                scale_codes, min_codes = address(scale8), address(min8)
            for t in range(0, T, rows):
                for i in range(rows):
                    common[i] = 0
                total[:] = 0
                x_at, s_at = address(x) + t * K * x_item, address(scales) + 4 * t * groups
                sum_at, total_at = address(sums) + 4 * t * groups, address(total) + 4 * even
                for g in range(groups):
                    at = g * step * beside
                    if n == BLOCK:  # its groups share a grid
                        group(
                            bits, rows, wide, way, size, False, LINES, codes + 4 * at, 4 * BLOCK, high + 2 * at,
                            2 * BLOCK, x_at + g * size * x_item, K * x_item, scale_codes + g * BLOCK,
                            min_codes + g * BLOCK, base + grids_at + 2 * (grid + g), 2 * count,
                            s_at + 4 * g, sum_at + 4 * g, 4 * groups, total_at, address(common),
                        )  # fmt: skip
                    else:
                        for r in range(n):
                            for k in range(4):
                                lanes[k, r] = grids[k, (item + g * n + r) // SUPER - grid]
                        for v in range(0, n, LANES):
                            r = min(v, beside - LANES)
                            group(
                                bits, rows, LANES, way, size, True, 1, codes + 4 * (at + r), 4 * beside,
                                high + 2 * (at + r), 2 * beside, x_at + g * size * x_item, K * x_item,
                                scale_codes + g * beside + r, min_codes + g * beside + r,
                                address(lanes) + 4 * r, 4 * BLOCK,
                                s_at + 4 * g, sum_at + 4 * g, 4 * groups, total_at + 4 * v, address(common),
                            )  # fmt: skip
                for i in range(min(rows, out.shape[0] - t)):
                    for v in range(0, n, LANES):
                        r = max(0, min(v, n - LANES))
                        for k in range(min(LANES, n)):
                            value = total[even + i * BLOCK + v + k] + common[i]
                            if narrow:
                                out16[t + i, start + r + k] = to_bf16(value)
                            else:
                                out[t + i, start + r + k] = value

    return loop


# Weights --------------------------------------------------------------------------------------------------------------


@functools.cache
def dequantizer(bits: int) -> Callable:
    """The weights of one block of outputs, inputs first: image into out (K, n), the bits of `QTensor.dequantize`."""
    width, third = WIDTH[bits], int(bits == 3)
    per_word, mask = 32 // width, np.int32(2**width - 1)

    def dequantize(image, N, size, start, out):
        K, n = out.shape
        groups, step, item = K // size, size // per_word, start * (K // size)
        items, high_at = N * groups, N * K * width // 8
        count, grids_at = (items + SUPER - 1) // SUPER, high_at + third * (N * K // 8)
        first_grid = item // SUPER
        grids = grids_of(image, grids_at, count, first_grid, (item + n * groups - 1) // SUPER - first_grid + 1)
        codes_at = start * K * width // 8
        words = image[codes_at : codes_at + n * K * width // 8].view(np.int32)
        highs = image[high_at + start * K // 8 : high_at + third * ((start + n) * K // 8)].view(np.int16)
        scale_codes = image[grids_at + 8 * count :]
        scale, zero = np.empty(n, np.float32), np.empty(n, np.float32)
        for g in range(groups):
            for r in range(n):
                at = item + g * n + r
                i = at // SUPER - first_grid
                scale[r] = grids[0, i] + np.float32(scale_codes[at]) * grids[1, i]
                minimum = grids[2, i] + np.float32(scale_codes[items + at]) * grids[3, i]
                zero[r] = -minimum / scale[r] if scale[r] > 0 else np.float32(0)
            for j in range(g * step, (g + 1) * step):
                for i in range(per_word):
                    k = j * per_word + i
                    if third:
                        for r in range(n):
                            low = words[j * n + r] >> np.int32(width * i) & mask
                            top = np.int32(highs[k // 16 * n + r]) >> np.int32(k % 16) & np.int32(1)
                            out[k, r] = (np.float32(low | top << np.int32(2)) - zero[r]) * scale[r]
                    else:
                        for r in range(n):
                            code = words[j * n + r] >> np.int32(width * i) & mask
                            out[k, r] = (np.float32(code) - zero[r]) * scale[r]

    return jit(dequantize, "numpy")

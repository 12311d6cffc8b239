"""The solvers of `solve`, and the storing of their results, compiled by numba: one call per block of outputs.

Letters: **G** group size. Arrays of groups (groups, G) are row by row; metadata are in the order in which they are
stored: groups of inputs ascending, with the outputs next to each other. Groups are fitted side by side, one per lane,
which LLVM turns into vectors. A call does not hold the GIL, so several threads can each process a block.

Equal to the torch functions of `solve`, bit for bit. Importing this module imports numba.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numba.extending import register_jitable
from numpy import ndarray

from mixoff.jit import jit
from mixoff.quantize import layout
from mixoff.quantize.layout import (
    BETA,
    ITERATIONS,
    LARGEST,
    LP_NORM,
    RESOLUTION,
    ROUND,
    SHRINK_ABOVE,
    SMALLEST_SCALE,
    SOLVERS,
    SUPER,
)

Arrays = tuple[ndarray, ...]
F32: TypeAlias = np.float32
STAMP = zlib.crc32(Path(layout.__file__).read_bytes())  # part of the cache key: numba does not notice changes there
ABREAST = 2**11  # weights whose groups are fitted side by side: with their products they stay in the first cache
HQQ, LSQ = SOLVERS.index("hqq"), SOLVERS.index("lsq")
ZERO, ONE = np.float32(0), np.float32(1)
FINEST, LEAST_SCALE = np.float32(RESOLUTION), np.float32(SMALLEST_SCALE)
LEVELS, WIDER = np.float32(256), np.float32(256 / 255)  # codes of a grid; its span is that of the values times WIDER
NORMAL = np.float32(2.0**-14)  # fp16's smallest normal number


@functools.cache
def compiled() -> Callable:
    """The function that solves, stores and packs a block of outputs; False if a weight is out of range or NaN.

    - w: weights (groups, G).
    - solver: index in SOLVERS.
    - bits: bits per code.
    - codes, high: words (words per row, rows); `high` is used for 3 bits only.
    - wide: scale and minimum as fp16 bits (groups,), for 16-bit metadata.
    - grids: four arrays of fp16 bits (super-groups,), for 8-bit metadata.
    - fine: two arrays of codes (groups,), for 8-bit metadata.
    """
    stamp = STAMP

    def quantize_block(
        w: ndarray, solver: int, bits: int, codes: ndarray, high: ndarray, wide: Arrays, grids: Arrays, fine: Arrays
    ) -> bool:
        return block(stamp, w, solver, bits, codes, high, wide, grids, fine)

    return jit(quantize_block, "numpy")


@register_jitable
def block(
    stamp: int,
    w: ndarray,
    solver: int,
    bits: int,
    codes: ndarray,
    high: ndarray,
    wide: Arrays,
    grids: Arrays,
    fine: Arrays,
) -> bool:
    """See `compiled`."""
    top, rows = np.float32(2**bits - 1), codes.shape[1]
    solved = np.empty((4, len(w)), np.float32)
    scale, minimum, energy, overlap = solved[0], solved[1], solved[2], solved[3]
    if not solve(w, top, solver, scale, minimum, energy, overlap):
        return False
    gain = gains(energy.reshape(rows, -1), overlap.reshape(rows, -1))
    scale, minimum = as_stored(scale, gain), as_stored(minimum, gain)
    if len(wide[0]):
        store_wide(scale, wide[0])
        store_wide(minimum, wide[1])
    else:
        store_grids(scale, minimum, grids, fine)
    encode(w, scale, minimum, gain, top, 0, 2 if bits == 3 else bits, codes)
    if bits == 3:
        encode(w, scale, minimum, gain, top, 2, 1, high)
    return True


# Scale and minimum ----------------------------------------------------------------------------------------------------


@register_jitable
def solve(
    w: ndarray, top: F32, solver: int, scale: ndarray, minimum: ndarray, energy: ndarray, overlap: ndarray
) -> bool:
    """`solve.solve` of groups (groups, G) into four arrays (groups,); False for what `check_range` refuses."""
    lanes = max(1, min(len(w), ABREAST // w.shape[1]))
    values = np.zeros((w.shape[1], lanes), np.float32)
    for first in range(0, len(w), lanes):
        some = slice(first, min(first + lanes, len(w)))
        for i in range(some.stop - first):
            for k in range(len(values)):
                values[k, i] = w[first + i, k]
        low, high, sound = bounds(values)
        if not sound:
            return False
        solve_lanes(w[some], values, low, high, top, solver, scale[some], minimum[some], energy[some], overlap[some])
    return True


@register_jitable
def solve_lanes(
    w: ndarray,
    values: ndarray,
    low: ndarray,
    high: ndarray,
    top: F32,
    solver: int,
    scale: ndarray,
    minimum: ndarray,
    energy: ndarray,
    overlap: ndarray,
) -> None:
    """Solve groups (groups, G), each of which is also in a lane of `values` (G, lanes); lanes may be left over."""
    lanes = np.empty((5, len(low)), np.float32)
    s, m, floor, energies, overlaps = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    for i in range(len(low)):
        floor[i] = max(max(-low[i], high[i]) * FINEST, LEAST_SCALE)
        s[i], m[i] = max((high[i] - low[i]) / top, floor[i]), low[i]
        energies[i], overlaps[i] = ONE, ONE
    if solver == HQQ:
        refine(w, low, high, top, s, m)
    elif solver == LSQ:
        fit(values, top, s, m, energies, overlaps)
    for i in range(len(scale)):
        constant = low[i] == high[i]
        scale[i] = max(-low[i], high[i]) if constant else max(s[i], floor[i])
        minimum[i] = min(low[i], ZERO) if constant else m[i]
        energy[i], overlap[i] = energies[i], overlaps[i]


@register_jitable
def bounds(values: ndarray) -> tuple[ndarray, ndarray, bool]:
    """Minimum and maximum of each lane (lanes,), and whether all values are finite and at most LARGEST."""
    low, high, wrong, sound = values[0].copy(), values[0].copy(), np.zeros(values.shape[1], np.float32), 0
    for k in range(len(values)):
        for i in range(len(low)):
            low[i], high[i] = min(low[i], values[k, i]), max(high[i], values[k, i])
            wrong[i] += values[k, i] - values[k, i]  # 0, or NaN for NaN and infinity
    for i in range(len(low)):
        sound += (wrong[i] == 0) & (max(-low[i], high[i]) <= LARGEST)
    return low, high, sound == len(low)


@register_jitable
def nearest_code(x: F32, top: F32) -> F32:
    """`solve.nearest_codes` of one number."""
    return min(max(x, np.float32(0)), top) + ROUND - ROUND


@register_jitable
def fold(values: ndarray, width: int) -> None:
    """`solve.fold` of the columns of (width, lanes), in place: the sums end up in row 0."""
    while width > 1:
        half = (width + 1) // 2
        for k in range(width - half):
            for i in range(values.shape[1]):
                values[k, i] += values[half + k, i]
        width = half


@register_jitable
def fit(values: ndarray, top: F32, s: ndarray, m: ndarray, energy: ndarray, overlap: ndarray) -> None:
    """`solve.fit_torch` of the groups in the lanes (G, lanes), into arrays (lanes,).

    A lane that has converged does not change any more: the same line gives the same codes, and these the same line.
    """
    size, lanes = np.float32(len(values)), len(s)
    products, apart = values.copy(), np.empty(values.shape, np.float32)
    fold(products, len(values))
    mean = products[0].copy()
    for i in range(lanes):
        mean[i] *= ONE / size
    for k in range(len(values)):
        for i in range(lanes):
            apart[k, i] = values[k, i] - mean[i]
            products[k, i] = values[k, i] * values[k, i]
    fold(products, len(values))
    for i in range(lanes):
        energy[i] = products[0, i]
    sums = np.empty((3, lanes), np.float32)
    inverse, total, squares = sums[0], sums[1], sums[2]
    for _ in range(ITERATIONS):
        for i in range(lanes):
            inverse[i], total[i], squares[i] = ONE / s[i], np.float32(0), np.float32(0)
        for k in range(len(values)):
            for i in range(lanes):
                q = nearest_code((values[k, i] - m[i]) * inverse[i], top)
                products[k, i] = q * apart[k, i]
                total[i] += q
                squares[i] += q * q
        fold(products, len(values))
        if lines(products[0], size, mean, total, squares, s, m) == 0:
            break
    for i in range(lanes):
        overlap[i] = s[i] * (products[0, i] + total[i] * mean[i]) + m[i] * (size * mean[i])


@register_jitable
def lines(
    covariance: ndarray, size: F32, mean: ndarray, total: ndarray, squares: ndarray, s: ndarray, m: ndarray
) -> int:
    """Update each lane's line to the best one for its codes; returns how many lines changed."""
    moved = 0
    for i in range(len(s)):
        codes, before_s, before_m = np.int32(total[i]), s[i], m[i]
        spread = np.float32(np.int32(size) * np.int32(squares[i]) - codes * codes)
        s[i] = size * covariance[i] / spread if spread > 0 else before_s
        m[i] = mean[i] - s[i] * (total[i] * (ONE / size))
        moved += (s[i] != before_s) | (m[i] != before_m)
    return moved


@register_jitable
def refine(w: ndarray, low: ndarray, high: ndarray, top: F32, scale: ndarray, minimum: ndarray) -> None:
    """`solve.refine_torch` of groups (groups, G), with the resulting zero as a minimum."""
    size, buffer = w.shape[1], np.empty((w.shape[1], 1), np.float32)
    share = np.float32(1 / size)
    for group in range(len(w)):
        row, a, z = w[group], ONE / scale[group], -low[group] / scale[group]
        for k in range(size):
            buffer[k, 0] = row[k]
        fold(buffer, size)
        mean = buffer[0, 0] * share
        for _ in range(ITERATIONS):
            total, shrunk, settled = 0, 0.0, z
            for k in range(size):
                total += np.int32(nearest_code(row[k] * a + z, top))
            if high[group] - low[group] > SHRINK_ABOVE:
                for k in range(size):
                    e = row[k] - (nearest_code(row[k] * a + z, top) - z) / a
                    error = np.float64(abs(e))
                    if error > SHRINK_ABOVE:
                        shrunk += np.sign(e) * (error - error ** (LP_NORM - 1) / BETA)
            z = np.float32(total) * share - (mean - np.float32(shrunk) * share) * a
            if z == settled:
                break
        minimum[group] = -z * scale[group]


# Metadata -------------------------------------------------------------------------------------------------------------


@register_jitable
def gains(energy: ndarray, overlap: ndarray) -> ndarray:
    """The factor that stretches each row to unit gain (rows,), from sums of its groups (rows, groups per row)."""
    energy, overlap = energy.T.copy(), overlap.T.copy()
    fold(energy, len(energy))
    fold(overlap, len(overlap))
    gain = np.ones(energy.shape[1], np.float32)
    for row in range(len(gain)):
        if overlap[0, row] > 0:
            gain[row] = min(max(energy[0, row] / overlap[0, row], ONE), np.float32(2))
    return gain


@register_jitable
def as_stored(values: ndarray, gain: ndarray) -> ndarray:
    """Values (groups,), row by row, times the gain of the row, reordered as metadata are stored (groups,)."""
    rows, stored = len(gain), np.empty(len(values), np.float32)
    for row in range(rows):
        for g in range(len(values) // rows):
            stored[g * rows + row] = values[row * (len(values) // rows) + g] * gain[row]
    return stored


@register_jitable
def half_bits(x: F32) -> int:
    """The bits of the fp16 number nearest to `x`, half to even; |x| < 65504, and zeros are positive."""
    size = abs(x)
    if size < NORMAL:
        bits = np.int32(size / LEAST_SCALE + ROUND - ROUND)
    else:
        whole = np.float32(size).view(np.int32)
        bits = ((whole + 0xFFF + ((whole >> 13) & 1)) >> 13) - (112 << 10)
    return bits | 0x8000 if bits and x < 0 else bits


@register_jitable
def from_half(bits: int) -> F32:
    """The fp32 number of fp16 bits that are neither infinity nor NaN."""
    whole = np.int32(bits & 0x7FFF)
    size = np.float32(whole) * LEAST_SCALE if whole < 1024 else np.int32((whole << 13) + (112 << 23)).view(np.float32)
    return -size if bits & 0x8000 else size


@register_jitable
def store_wide(values: ndarray, stored: ndarray) -> None:
    """Write values (groups,) as fp16 bits, and replace them by the stored numbers."""
    for g in range(len(values)):
        stored[g] = half_bits(values[g])
        values[g] = from_half(stored[g])


@register_jitable
def store_grids(scale: ndarray, minimum: ndarray, grids: Arrays, fine: tuple[ndarray, ...]) -> None:
    """Write values (groups,) on the grids of their super-groups, and replace them by the stored numbers."""
    for number in range(len(grids[0])):
        some = slice(number * SUPER, min((number + 1) * SUPER, len(scale)))
        keep_zeros(scale[some], minimum[some])
        negate(minimum[some])
        grids[0][number], grids[1][number] = store_grid(scale[some], fine[0][some])
        base, grids[3][number] = store_grid(minimum[some], fine[1][some])
        negate(minimum[some])
        grids[2][number] = base ^ 0x8000 if base else 0


@register_jitable
def negate(values: ndarray) -> None:
    """Negate each value, in place."""
    for g in range(len(values)):
        values[g] = -values[g]


@register_jitable
def keep_zeros(scale: ndarray, minimum: ndarray) -> None:
    """`solve.keep_zeros` of one super-group (groups,), in place."""
    zeros, least = 0, np.float32(np.inf)
    for g in range(len(scale)):
        if scale[g] == 0:
            zeros += 1
        else:
            least = min(least, scale[g])
    for g in range(len(scale) if zeros else 0):
        minimum[g] = min(minimum[g], ZERO)
        if scale[g] == 0:
            scale[g] = ZERO if zeros == len(scale) else least


@register_jitable
def store_grid(values: ndarray, codes: ndarray) -> tuple[int, int]:
    """`solve.to_grid` of one super-group; returns bits of base and span, and replaces values by the stored numbers."""
    low, high = values[0], values[0]
    for g in range(len(values)):
        low, high = min(low, values[g]), max(high, values[g])
    base_bits = half_bits(low)
    base = from_half(base_bits)
    span_bits = half_bits(max((high - base) * WIDER, ZERO))
    span = from_half(span_bits)
    per_value = LEVELS / span if span > 0 else ZERO
    for g in range(len(values)):
        code = nearest_code((values[g] - base) * per_value, LEVELS - ONE)
        codes[g] = np.int32(code)
        values[g] = base + code * (span / LEVELS)
    return base_bits, span_bits


# Codes ----------------------------------------------------------------------------------------------------------------


@register_jitable
def encode(
    w: ndarray, scale: ndarray, minimum: ndarray, gain: ndarray, top: F32, shift: int, width: int, words: ndarray
) -> None:
    """Round groups (groups, G) to codes, and pack bits shift..shift + width of each into words (words per row, rows).

    scale, minimum: stored metadata (groups,), which describe `gain` (rows,) times the weights.
    """
    size, rows = w.shape[1], len(gain)
    mask, per_word = 2**width - 1, 8 * words.itemsize // width
    codes, per_row = np.empty(size, np.int32), len(w) // rows
    for group in range(len(w)):
        row, g = group // per_row, group % per_row
        a, z = factor_and_zero(scale[g * rows + row], minimum[g * rows + row], gain[row])
        for k in range(size):
            codes[k] = (np.int32(nearest_code(w[group, k] * a + z, top)) >> shift) & mask
        for i in range(size // per_word):
            word = np.int32(0)
            for k in range(per_word):
                word |= codes[i * per_word + k] << np.int32(k * width)
            words[g * (size // per_word) + i, row] = word


@register_jitable
def factor_and_zero(scale: F32, minimum: F32, gain: F32) -> tuple[F32, F32]:
    """Factor and zero of `code = weight * factor + zero`; both 0 for a group of zeros."""
    return (gain / scale, -minimum / scale) if scale > 0 else (ZERO, ZERO)

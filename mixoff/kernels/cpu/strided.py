"""Products of a few rows with weights whose groups run across outputs, on a CPU, compiled by numba.

Letters: **T** rows of activations, **N** outputs, **K** inputs, **G** group size, **R** = N/G.
The G outputs r, r + R, r + 2R, ... share their groups, so each activation is scaled once for all of them, and the zeros
are summed once; then every code costs a mask, a conversion and an addition. Fields are not shifted down: the sum of the
field at bit 2i is divided by 4**i at the end. Activations stay fp32. Where numba is missing, `reference` computes
instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from mixoff.jit import jit
from mixoff.kernels.cpu.products import share
from mixoff.quantize.strided import StridedTensor

BITS = (2, 4)
MOST_ROWS = 4  # more rows share the cost of dequantizing once


def serves(x: torch.Tensor, w: StridedTensor) -> bool:
    """Whether this module computes `x @ w.T`: decided by rows, bits, device and numba's presence alone."""
    few = x.shape[0] <= MOST_ROWS and w.form.bits in BITS
    return few and x.device.type == "cpu" and kernel(w.form.bits) is not None


def linear(x: torch.Tensor, w: StridedTensor) -> torch.Tensor:
    """`x @ w.T` for x (T, K) and w (N, K), in x's dtype -> (T, N); `serves(x, w)` must hold."""
    out = torch.empty(x.shape[0], w.shape[0])  # (T, N)
    rows, run = w.shape[0] // len(w.matrices), kernel(w.form.bits)
    assert run is not None
    activations = x.float().contiguous().numpy()
    for i, parts in enumerate(w.matrices):
        columns = out[:, i * rows : (i + 1) * rows].numpy()
        share(functools.partial(run, activations, *_arrays(parts), columns), w.step, rows * w.shape[1])
    return out.to(x.dtype)


def _arrays(parts: dict[str, torch.Tensor]) -> tuple:
    """Codes (G * bits / 8, M), codes of scales (M,) and zeros (M,), the scales' grids (C,), the zeros' two numbers."""
    codes, scales, zeros = (parts[name].numpy() for name in ("W_q", "meta.scale_q", "meta.zero_q"))
    grids = [parts[f"meta.meta_scale.{name}"].float().numpy().ravel() for name in ("scale", "zero")]
    numbers = [np.float32(parts[f"meta.meta_zero.{name}"].item()) for name in ("scale", "zero")]
    return codes, scales.ravel(), zeros.ravel(), *grids, *numbers


@functools.cache
def kernel(bits: int) -> Callable | None:
    """The compiled loop for codes of `bits` bits, None where numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    numba.extending.register_jitable(scaled)
    for part in (fields_of_2, fields_of_4, fields_of_8):
        numba.extending.register_jitable(fastmath=FAST)(part)
    return jit(LOOPS[bits])


# LLVM sums in as many lanes as the machine has: the same on every run, but not on every machine. A loop that sums must
# not store: LLVM would check at run time whether arrays overlap, and the order of sums would depend on their addresses.
FAST = {"contract", "reassoc", "nsz"}


def scaled(x, scales, grid_scale, grid_zero, first, out):
    """x (K,) times the scales of the groups from `first` on, into `out` (K,)."""
    columns, k = len(grid_scale), 0
    while k < len(x):
        column = (first + k) % columns
        run = min(len(x) - k, columns - column)
        for j in range(run):
            scale = (np.float32(np.int32(scales[first + k + j])) - grid_zero[column + j]) * grid_scale[column + j]
            out[k + j] = x[k + j] * scale
        k += run


def fields_of_8(codes, x, base):
    """Sum of x (K,) times codes (K,) less `base`."""
    total = np.float32(0)
    for k in range(len(x)):
        total += (np.float32(np.int32(codes[k])) - base) * x[k]
    return total


def fields_of_2(codes, x, sums):
    """Sums of x (K,) times each of the four fields of codes (K,), the high one first."""
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for k in range(len(x)):
        byte, value = np.int32(codes[k]), x[k]
        a += np.float32(np.int32(byte & 0xC0)) * value
        b += np.float32(np.int32(byte & 0x30)) * value
        c += np.float32(np.int32(byte & 0x0C)) * value
        d += np.float32(np.int32(byte & 0x03)) * value
    sums[0], sums[1], sums[2], sums[3] = a / 64, b / 16, c / 4, d


def fields_of_4(codes, x, sums):
    """Sums of x (K,) times each of the two fields of codes (K,), the high one first."""
    a, b = np.float32(0), np.float32(0)
    for k in range(len(x)):
        byte, value = np.int32(codes[k]), x[k]
        a += np.float32(np.int32(byte & 0xF0)) * value
        b += np.float32(np.int32(byte & 0x0F)) * value
    sums[0], sums[1] = a / 16, b


def _loop(bits: int, fields: Callable) -> Callable:
    """The loop over rows of groups, for codes of one width."""
    count = 8 // bits

    def loop(x, codes, scales, zeros, grid_scale, grid_zero, zero_scale, zero_zero, out, first, last):
        K = x.shape[1]
        step = out.shape[1] // (codes.shape[0] * count)  # R
        values, sums = np.empty(K, np.float32), np.empty(count, np.float32)
        for t in range(x.shape[0]):
            for r in range(first, last):
                scaled(x[t], scales, grid_scale, grid_zero, r * K, values)
                zero = zero_scale * fields_of_8(zeros[r * K : (r + 1) * K], values, zero_zero)
                for row in range(codes.shape[0]):
                    fields(codes[row, r * K : (r + 1) * K], values, sums)
                    for i in range(count):
                        out[t, (i * codes.shape[0] + row) * step + r] = sums[i] - zero

    return loop


LOOPS = {2: _loop(2, fields_of_2), 4: _loop(4, fields_of_4)}

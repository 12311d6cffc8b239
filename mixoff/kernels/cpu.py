"""Products of a few rows with quantized weights on a CPU, straight from the packed codes, compiled by numba.

Letters: **T** rows of activations, **N** outputs, **K** inputs, **G** group size.
Nothing is unpacked into memory: a word of codes meets its activations in registers, and 128 outputs advance side by
side, as `mixoff.quantize` lays them out. Each output is summed by one thread in one order, so results do not depend on
the number of threads. Activations stay fp32.

Does not know experts or caches. Where numba is missing, `reference` computes instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from mixoff.quantize import BLOCK, SUPER, QTensor

MOST_ROWS = 4  # more rows share the cost of dequantizing once; measured for 4096x4096 in docs/benchmarks.md
BITS = (2, 4, 8)  # 3-bit codes lie in two arrays: left to `reference`
SHARED_ABOVE = 1 << 21  # weights; a smaller matrix is done before another thread has woken up


def serves(x: torch.Tensor, w: QTensor) -> bool:
    """Whether this module computes `x @ w.T`: decided by rows, bits, device and numba's presence alone."""
    few = x.shape[0] <= MOST_ROWS and w.bits in BITS and w.metadata_bits == 8
    return few and x.device.type == "cpu" and kernel(w.bits) is not None


def linear(x: torch.Tensor, w: QTensor) -> torch.Tensor:
    """`x @ w.T` for x (T, K) and w (N, K), in x's dtype -> (T, N); `serves(x, w)` must hold."""
    out = torch.empty(x.shape[0], w.shape[0])  # (T, N)
    arrays = [w.parts[name].numpy() for name in ("codes", "scale_base", "scale_span", "min_top", "min_span")]
    codes, grids = arrays[0], [grid.view(np.float16).astype(np.float32) for grid in arrays[1:]]
    metadata = w.parts["scale_codes"].numpy(), w.parts["min_codes"].numpy()
    arguments = (x.float().contiguous().numpy(), codes.view(np.uint32), *grids, *metadata, w.group_size, out.numpy())
    run, blocks = kernel(w.bits), -(-w.shape[0] // BLOCK)
    threads = min(torch.get_num_threads(), blocks) if w.shape[0] * w.shape[1] > SHARED_ABOVE else 1
    bounds = [blocks * i // threads for i in range(threads + 1)]
    if threads == 1:
        run(*arguments, 0, blocks)
    else:
        list(pool(threads).map(lambda i: run(*arguments, bounds[i], bounds[i + 1]), range(threads)))
    return out.to(x.dtype)


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads that wait for work; numba's own would end the process when two models compute at once."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mixoff-kernel")


@functools.cache
def kernel(bits: int) -> Callable | None:
    """The compiled loop for codes of `bits` bits, None where numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    try:
        return numba.njit(nogil=True, fastmath={"contract"}, cache=True)(LOOPS[bits])
    except RuntimeError:  # no folder in which to keep compiled code
        return numba.njit(nogil=True, fastmath={"contract"})(LOOPS[bits])


def _loop(bits: int) -> Callable:
    """The loop over blocks, written once for all widths: `bits` and what follows from it are constants to numba."""
    per_word, mask = 32 // bits, np.uint32(2**bits - 1)

    def loop(x, codes, base, span, top, min_span, scale_codes, min_codes, group, out, first, last):
        rows, K = x.shape
        N = out.shape[1]
        words, groups = K // per_word, K // group
        step = group // per_word  # words of a group
        acc, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        for t in range(rows):
            for b in range(first, last):
                start = b * BLOCK
                n = min(BLOCK, N - start)
                block = codes[start * words : (start + n) * words].reshape(words, n)
                total[:] = np.float32(0)
                for g in range(groups):
                    acc[:] = np.float32(0)
                    sum_x = np.float32(0)
                    for j in range(g * step, (g + 1) * step):
                        word = block[j]
                        for i in range(per_word):
                            value, shift = x[t, j * per_word + i], np.uint32(bits * i)
                            sum_x += value
                            for r in range(n):
                                acc[r] += np.float32(np.int32((word[r] >> shift) & mask)) * value
                    item = start * groups + g * n
                    for r in range(n):
                        grid = (item + r) // SUPER
                        scale = base[grid] + np.float32(scale_codes[item + r]) * (span[grid] / np.float32(256))
                        low = top[grid] - np.float32(min_codes[item + r]) * (min_span[grid] / np.float32(256))
                        total[r] += scale * acc[r] + low * sum_x
                out[t, start : start + n] = total[:n]

    return loop


LOOPS = {bits: _loop(bits) for bits in BITS}

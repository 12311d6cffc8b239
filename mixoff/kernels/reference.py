"""Dense products in the dtype of the activations, straight from weights as the store keeps them.

Letters: **T** rows of activations, **N** outputs, **K** inputs, **B** rows of a block.
A weight in another dtype (fp16 files on a CPU, which computes in fp32) is widened block by block into a small scratch,
and a quantized one dequantized so: never as a whole, since scratch counts against the budget. Widened weights give the
bits of one product with the whole, because each output is its own sum over K; tests/test_kernels.py holds it to that.

Does not know experts or caches.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mixoff.quantize import BLOCK, QTensor
from mixoff.shapes import Part, Site, torch_dtype
from mixoff.strided import StridedTensor

BLOCK_ROWS = 32  # rows of a weight widened at a time; at K = 4096 in fp32 a block is 512 KiB and stays in the L2 cache
EVEN_ROWS = 8  # BLAS sums the odd rows at the end of a matrix in another order: such a weight is one block
DEQUANTIZED = 4 * torch.float32.itemsize  # bytes an item of a block: codes, shifted codes, weights, and the last copy


def block_rows(n: int) -> int:
    """Rows in which a weight of `n` rows is widened.

    >>> block_rows(384), block_rows(24), block_rows(90)
    (32, 24, 90)
    """
    return min(BLOCK_ROWS, n) if n % EVEN_ROWS == 0 else n


def scratch_nbytes(sites: Iterable[Site], compute: torch.dtype) -> int:
    """Bytes of scratch that `linear` needs at most for any weight of these experts; none when no widening is due."""
    return max(_part_scratch(part, site.transposed, compute) for site in sites for part in site.parts)


def _part_scratch(part: Part, transposed: bool, compute: torch.dtype) -> int:
    if len(part.shape) != 2 or (part.form is None and torch_dtype(part.dtype) == compute):
        return 0
    N, K = part.shape[::-1] if transposed else part.shape
    if part.form is not None:
        return min(BLOCK, N) * K * DEQUANTIZED
    return block_rows(N) * K * compute.itemsize


def linear(
    x: torch.Tensor, w: torch.Tensor | QTensor, scratch: torch.Tensor | None = None, transposed: bool = False
) -> torch.Tensor:
    """`x @ w.T` for x (T, K) and w (N, K), in x's dtype -> (T, N); `transposed`: `x @ w` for w (K, N).

    `scratch`: uint8, `scratch_nbytes` long; a quantized weight takes its scratch from torch, no more than that.
    """
    if isinstance(w, (QTensor, StridedTensor)):
        return _from_codes(x, w)
    w = w if transposed else w.t()  # (K, N)
    return torch.mm(x, w) if w.dtype == x.dtype else _widened(x, w, scratch)


def _widened(x: torch.Tensor, w: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The product with w (K, N) in another dtype, a block of outputs at a time, each laid out in memory as w is.

    Blocks are as large as the scratch allows: every call of torch costs more than a small block's work.
    """
    K, N = w.shape
    fitting = scratch.numel() // (K * x.element_size()) // EVEN_ROWS * EVEN_ROWS
    B = max(block_rows(N), min(N, fitting))
    out = x.new_empty(x.shape[0], N)  # (T, N)
    wide = scratch.view(x.dtype)[: K * B]
    wide = wide.view(K, B) if w.stride(1) == 1 else wide.view(B, K).t()  # (K, B)
    for start in range(0, N, B):
        start = min(start, N - B)  # the last block reaches back, so that all are alike
        wide.copy_(w[:, start : start + B])
        torch.mm(x, wide, out=out[:, start : start + B])  # (T, B)
    return out


def _from_codes(x: torch.Tensor, w: QTensor | StridedTensor) -> torch.Tensor:
    out = x.new_empty(x.shape[0], w.shape[0])  # (T, N)
    for start, stop in w.blocks():
        weights = w.block_weights(start, stop).to(x.dtype)  # (B, K)
        torch.mm(x, weights.t(), out=out[:, start:stop])  # (T, B)
    return out

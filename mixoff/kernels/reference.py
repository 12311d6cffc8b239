"""Dense products in the dtype of the activations, straight from weights in the dtype of the store.

Letters: **T** rows of activations, **N** outputs, **K** inputs, **B** rows of a block.
Where the two dtypes differ (fp16 files on a CPU, which computes in fp32), the weight is widened block by block into a
small scratch, never as a whole: the scratch counts against the budget. Bit for bit equal to one product with the whole
widened weight, because each output is its own sum over K; tests/test_kernels.py holds it to that.

Does not know experts or caches.
"""

from __future__ import annotations

import torch

BLOCK_ROWS = 32  # rows of a weight widened at a time; at K = 4096 in fp32 a block is 512 KiB and stays in the L2 cache
EVEN_ROWS = 8  # BLAS sums the odd rows at the end of a matrix in another order: such a weight is one block


def block_rows(n: int) -> int:
    """Rows in which a weight of `n` rows is widened.

    >>> block_rows(384), block_rows(24), block_rows(90)
    (32, 24, 90)
    """
    return min(BLOCK_ROWS, n) if n % EVEN_ROWS == 0 else n


def scratch_nbytes(shapes: list[tuple[int, int]], stored: torch.dtype, compute: torch.dtype) -> int:
    """Bytes of scratch that `linear` needs for weights of `shapes` (N, K); none when no widening is due."""
    return 0 if stored == compute else max(block_rows(n) * k for n, k in shapes) * compute.itemsize


def linear(x: torch.Tensor, w: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """`x @ w.T` for x (T, K) and w (N, K), in x's dtype -> (T, N). `scratch`: uint8, see `scratch_nbytes`."""
    if w.dtype == x.dtype:
        return torch.mm(x, w.t())
    N, K = w.shape
    B = block_rows(N)
    out = x.new_empty(x.shape[0], N)  # (T, N)
    wide = scratch.view(x.dtype)[: B * K].view(B, K)
    for start in range(0, N, B):
        start = min(start, N - B)  # the last block reaches back, so that all are alike
        wide.copy_(w[start : start + B])
        torch.mm(x, wide.t(), out=out[:, start : start + B])  # (T, B)
    return out

"""Dense products in the dtype of the activations, straight from weights in the dtype of the store.

Letters: **T** rows of activations, **N** outputs, **K** inputs.
Where the two dtypes differ (fp16 files on a CPU, which computes in fp32), the weight is widened block by block into a
small scratch, never as a whole: the scratch counts against the budget. Bit for bit equal to one product with the whole
widened weight, because each output is its own sum over K (tests/test_kernels.py holds it to that).

Does not know experts or caches.
"""

from __future__ import annotations

import torch

BLOCK_ROWS = 32  # rows of a weight widened at a time; at K = 4096 in fp32 a block is 512 KiB and stays in the L2 cache


def scratch_nbytes(widths: list[int], stored: torch.dtype, compute: torch.dtype) -> int:
    """Bytes of scratch that `linear` needs for weights with `widths` inputs; none when no widening is due."""
    return 0 if stored == compute else BLOCK_ROWS * max(widths) * compute.itemsize


def linear(x: torch.Tensor, w: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """`x @ w.T` for x (T, K) and w (N, K), in x's dtype -> (T, N). `scratch`: uint8, see `scratch_nbytes`."""
    if w.dtype == x.dtype:
        return torch.mm(x, w.t())
    out = x.new_empty(x.shape[0], w.shape[0])  # (T, N)
    wide = scratch.view(x.dtype)[: BLOCK_ROWS * w.shape[1]].view(BLOCK_ROWS, -1)  # (B, K)
    for rows, columns in zip(w.split(BLOCK_ROWS), out.split(BLOCK_ROWS, dim=1), strict=True):
        block = wide if len(rows) == BLOCK_ROWS else wide[: len(rows)]
        torch.mm(x, block.copy_(rows).t(), out=columns)  # (T, B)
    return out

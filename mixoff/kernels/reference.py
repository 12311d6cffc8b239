"""Dense products in the dtype of the activations, straight from weights as the store keeps them.

Letters: **T** rows of activations, **N** outputs, **K** inputs, **B** rows of a block.
A weight in another dtype (fp16 files on a CPU, which computes in fp32) is widened into a scratch that counts against
the budget. To keep it small, the weight is widened block by block if that gives the same bits as one product. Each
output is its own sum over K, but a BLAS may order that sum by N, rows and threads (MKL does). So we check once which
order this BLAS uses, and if bits differ, the scratch holds the whole weight. For the many rows of a prompt, whose
activations are larger anyway, a weight of at most LARGE bytes is widened outside the scratch. A quantized weight is
dequantized block by block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from mixoff.quantize.layout import BLOCK
from mixoff.quantize.strided import StridedTensor
from mixoff.quantize.tensor import QTensor
from mixoff.shapes.sites import Part, Site, torch_dtype

BLOCK_ROWS = 32  # rows of a weight widened at a time; at K = 4096 in fp32 a block is 512 KiB and stays in the L2 cache
EVEN_ROWS = 8  # BLAS sums the odd rows at the end of a matrix in another order: such a weight is one block
FEW = 40  # rows for which blocks are compared with the whole; from 56 rows on, MKL's bits for AVX2 differ
LARGE = 1 << 22  # bytes, widened: larger weights are always widened whole; no check is made
DEQUANTIZED = 4 * torch.float32.itemsize  # bytes per item of a block: codes, shifted codes, weights, and the last copy


def block_rows(N: int, K: int, compute: torch.dtype, transposed: bool = False) -> int:
    """The smallest number of a weight's N rows that may be widened at a time, for torch's current number of threads.

    >>> block_rows(90, 64, torch.float32), block_rows(24, 64, torch.float32)  # odd, and hardly more than a block
    (90, 24)
    """
    if N <= BLOCK_ROWS or N % EVEN_ROWS or N * K * compute.itemsize > LARGE:
        return N
    return BLOCK_ROWS if _divides(N, K, compute, transposed, torch.get_num_threads()) else N


@functools.cache
def _divides(N: int, K: int, compute: torch.dtype, transposed: bool, threads: int) -> bool:
    """Whether blocks of outputs give the bits of one product here; `threads`, torch's number, is a key of the cache."""
    random = torch.Generator().manual_seed(0)
    scratch = torch.empty(BLOCK_ROWS * K * compute.itemsize, dtype=torch.uint8)
    w = torch.randn((K, N) if transposed else (N, K), generator=random).to(compute)
    w = w if transposed else w.t()
    x = torch.randn(FEW, K, generator=random).to(compute)
    return all(torch.equal(_in_blocks(x[:T], w, scratch), torch.mm(x[:T], w)) for T in range(1, FEW + 1))


def scratch_nbytes(sites: Iterable[Site], compute: torch.dtype) -> int:
    """Most bytes of scratch that `linear` needs for any weight of these experts; 0 if none is widened."""
    return max(_part_scratch(part, site.transposed, compute) for site in sites for part in site.parts)


def _part_scratch(part: Part, transposed: bool, compute: torch.dtype) -> int:
    if len(part.shape) != 2 or (part.form is None and torch_dtype(part.dtype) == compute):
        return 0
    N, K = part.shape[::-1] if transposed else part.shape
    if part.form is not None:
        return min(BLOCK, N) * K * DEQUANTIZED
    return block_rows(N, K, compute, transposed) * K * compute.itemsize


def linear(
    x: torch.Tensor, w: torch.Tensor | QTensor, scratch: torch.Tensor | None = None, transposed: bool = False
) -> torch.Tensor:
    """`x @ w.T` for x (T, K) and w (N, K), in x's dtype -> (T, N); `transposed`: `x @ w` for w (K, N).

    `scratch`: uint8, `scratch_nbytes` long; a quantized weight takes its scratch from torch, no more than that.
    """
    if isinstance(w, (QTensor, StridedTensor)):
        return _from_codes(x, w)
    w = w if transposed else w.t()  # (K, N)
    if w.dtype == x.dtype:
        return torch.mm(x, w)
    whole = w.numel() * x.element_size()
    if scratch is None or (scratch.numel() < whole and len(x) > FEW):
        return torch.mm(x, w.to(x.dtype))
    return _in_blocks(x, w, scratch)


def _in_blocks(x: torch.Tensor, w: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The product with w (K, N), widened to x's dtype: all of w if the scratch has room, else block by block.

    Each block has the memory layout of w: a BLAS may sum in another order for another layout.
    """
    K, N = w.shape
    B = N if scratch.numel() >= N * K * x.element_size() else BLOCK_ROWS
    out = x.new_empty(x.shape[0], N)  # (T, N)
    wide = scratch.view(x.dtype)[: K * B]
    wide = wide.view(K, B) if w.stride(1) == 1 else wide.view(B, K).t()  # (K, B)
    for start in range(0, N, B):
        start = min(start, N - B)  # the last block overlaps the one before, so that all have one size
        wide.copy_(w[:, start : start + B])
        torch.mm(x, wide, out=out[:, start : start + B])  # (T, B)
    return out


def _from_codes(x: torch.Tensor, w: QTensor | StridedTensor) -> torch.Tensor:
    out = x.new_empty(x.shape[0], w.shape[0])  # (T, N)
    for start, stop in w.blocks():
        weights = w.block_weights(start, stop).to(x.dtype)  # (B, K)
        torch.mm(x, weights.t(), out=out[:, start:stop])  # (T, B)
    return out

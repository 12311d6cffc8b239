"""Matrix products with weights as the store keeps them, behind one signature.

Which kernel computes depends on the weight's kind, bits and device, the number of rows, and whether numba is installed:
never on the cache's state or on a measurement, so runs repeat bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixoff.kernels import cpu, reference
from mixoff.quantize import QTensor

if TYPE_CHECKING:
    import torch


def linear(
    x: torch.Tensor, w: torch.Tensor | QTensor, scratch: torch.Tensor | None = None, transposed: bool = False
) -> torch.Tensor:
    """`x @ w.T` for x (T, K) and w (N, K), in x's dtype -> (T, N).

    transposed: a weight that is not quantized is (K, N), and the product `x @ w`. scratch: uint8,
    `reference.scratch_nbytes` long, for weights that are neither quantized nor of x's dtype.
    """
    if isinstance(w, QTensor) and cpu.serves(x, w):
        return cpu.linear(x, w)
    return reference.linear(x, w, scratch, transposed)

"""Matrix products with weights as the store keeps them, behind one signature.

Which kernel computes depends on the weight's kind, bits and device, the number of rows, `exact`, the CPU and whether
numba is installed: never on the cache's state or on a measurement, so runs repeat bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixoff.errors import MixoffError
from mixoff.kernels import cpu, reference, strided
from mixoff.quantize import QTensor
from mixoff.strided import StridedTensor

if TYPE_CHECKING:
    import torch

KERNELS = ("int8", "fp32", "dense", "reference")


def choose(x: torch.Tensor, w: torch.Tensor | QTensor | StridedTensor, exact: bool = False) -> str:
    """The kernel that computes `x @ w.T`: the table of docs/kernels.md.

    `int8` and `fp32` compute from packed codes, named for their activations; `dense` dequantizes each block of outputs
    once and multiplies with torch, for many rows; `reference` is torch alone.
    """
    if isinstance(w, StridedTensor):
        return "fp32" if strided.serves(x, w) else "reference"
    if not isinstance(w, QTensor) or not cpu.serves(x, w):
        return "reference"
    if not exact:
        return "int8"
    return "fp32" if x.shape[0] <= cpu.FP32_ROWS[w.bits] else "dense"


def linear(
    x: torch.Tensor,
    w: torch.Tensor | QTensor | StridedTensor,
    scratch: torch.Tensor | None = None,
    transposed: bool = False,
    exact: bool = False,
    kernel: str | None = None,
) -> torch.Tensor:
    """`x @ w.T` for x (T, K) and w (N, K), in x's dtype -> (T, N).

    transposed: a weight that is not quantized is (K, N), and the product `x @ w`. scratch: uint8,
    `reference.scratch_nbytes` long, for weights that are neither quantized nor of x's dtype. exact: activations stay
    fp32 where they would be quantized to int8. kernel: one of KERNELS instead of the table's choice.
    """
    chosen = kernel or choose(x, w, exact)
    if chosen != "reference" and isinstance(w, StridedTensor):
        return strided.linear(x, w)
    if chosen in ("int8", "fp32"):
        return cpu.linear(x, w, exact=chosen == "fp32")
    if chosen == "dense":
        return cpu.dense(x, w)
    if chosen != "reference":
        raise MixoffError(f"no kernel {chosen!r}: choose one of {', '.join(KERNELS)}")
    return reference.linear(x, w, scratch, transposed)

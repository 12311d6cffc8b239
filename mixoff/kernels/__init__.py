"""Matrix products with weights as the store keeps them, behind one signature.

Which kernel computes depends on the weight's kind, bits and device, the number of rows, `exact`, the CPU and whether
numba is installed. It never depends on the cache's state or on a measurement, so runs repeat bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mixoff.errors import MixoffError
from mixoff.kernels import reference
from mixoff.kernels.cpu import products, strided
from mixoff.kernels.triton import products as triton_products
from mixoff.kernels.triton import strided as triton_strided
from mixoff.kernels.triton.tiles import MOST_ROWS
from mixoff.quantize import rotation
from mixoff.quantize.strided import StridedTensor
from mixoff.quantize.tensor import QTensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

KERNELS = ("int8", "fp32", "dense", "reference", "triton", "triton-dense")
FUSED = ("int8", "fp32", "triton")  # straight from packed codes, with a fused gate


def choose(x: torch.Tensor, w: torch.Tensor | QTensor | StridedTensor, exact: bool = False) -> str:
    """The kernel that computes `x @ w.T`: the table of docs/kernels.md.

    - `int8`, `fp32`: from packed codes, with activations of that dtype.
    - `dense`: each block of outputs is dequantized once and multiplied by torch, for many rows.
    - `reference`: torch alone.
    - `triton`: on a CUDA card, from packed codes with fp32 sums, whether `exact` or not.
    - `triton-dense`: on a CUDA card, dequantized for cuBLAS.
    """
    if not isinstance(w, (QTensor, StridedTensor)):
        return "reference"
    if x.device.type in triton_products.DEVICES and _triton(w).serves(x, w):
        return "triton" if _rows(x) <= MOST_ROWS else "triton-dense"
    if isinstance(w, StridedTensor):
        return "fp32" if strided.serves(x, w) else "reference"
    if not products.serves(x, w):
        return "reference"
    if not exact:
        return "int8"
    return "fp32" if _rows(x) <= products.FP32_ROWS[w.bits] else "dense"


def linear(
    x: torch.Tensor,
    w: torch.Tensor | QTensor | StridedTensor,
    scratch: torch.Tensor | None = None,
    transposed: bool = False,
    exact: bool = False,
    kernel: str | None = None,
) -> torch.Tensor:
    """`x @ w.T` for x (..., K) and w (N, K), in x's dtype -> (..., N).

    - scratch: uint8 (`reference.scratch_nbytes`,), for weights that are neither quantized nor of x's dtype.
    - transposed: whether `w`, if not quantized, is (K, N) and the product is `x @ w`.
    - exact: whether activations stay fp32 instead of being quantized to int8.
    - kernel: one of KERNELS, instead of `choose`'s choice.
    """
    chosen = kernel or choose(x, w, exact)
    if chosen in ("int8", "fp32") and isinstance(w, QTensor):
        return products.linear(x, w, exact=chosen == "fp32")
    if x.dim() != 2:
        return linear(x.reshape(-1, x.shape[-1]), w, scratch, transposed, exact, chosen).unflatten(0, x.shape[:-1])
    if isinstance(w, QTensor) and w.rotated:
        x = (triton_products.rotated if chosen.startswith("triton") else rotation.rotate)(x).to(x.dtype)
    if chosen == "triton":
        return _triton(w).linear(x, w)
    if chosen == "triton-dense":
        return _triton(w).dense(x, w)
    if chosen != "reference" and isinstance(w, StridedTensor):
        return strided.linear(x, w)
    if chosen == "dense" and isinstance(w, QTensor):
        return products.dense(x, w)
    if chosen != "reference":
        raise MixoffError(f"no kernel {chosen!r}: choose one of {', '.join(KERNELS)}")
    return reference.linear(x, w, scratch, transposed)


def _rows(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()


def _triton(w: QTensor | StridedTensor) -> ModuleType:
    """The module for CUDA cards, by how the weight's groups run."""
    return triton_strided if isinstance(w, StridedTensor) else triton_products


def gated_mlps(
    x: torch.Tensor, experts: Sequence[tuple[QTensor, QTensor]] | triton_products.Table, exact: bool = False
) -> torch.Tensor:
    """`(silu(gate) * up) @ down.T` with gate and up the halves of `x @ gate_up.T` -> (E, T, N), in x's dtype.

    - x: activations (T, K).
    - experts: gate_up (2F, K) and down (N, F) of each of E experts, all in one form, for FUSED kernels; on a CUDA card
      also a table of where they are.
    - exact: as in `linear`. Intermediate values are fp32 in any case.
    """
    if isinstance(experts, triton_products.Table) or choose(x, experts[0][0], exact) == "triton":
        return triton_products.gated_mlps(x, experts)
    return products.gated_mlps(x, experts, exact)

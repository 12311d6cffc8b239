"""Products of rows on a CUDA card with weights whose groups run across outputs, as the published checkpoint has them.

Letters: **T** rows of activations, **N** outputs, **K** inputs, **G** group size, **R** = N/G, **C** grids of scales.
Up to `tiles.MOST_ROWS` rows are multiplied straight from the packed codes, at most two per program; for more, weights
are dequantized once, chunk by chunk, and multiplied by cuBLAS. A matrix may begin at any multiple of four bytes: loads
are 16 bytes wide if it begins at a multiple of 16, and 4 otherwise, such as in an expert's `up`.

Where triton is missing, `reference` computes instead. Never run on a card: docs/kernels.md says what was checked
without one.
"""

from __future__ import annotations

import torch

from mixoff.kernels.reference import DEQUANTIZED
from mixoff.kernels.triton import products
from mixoff.kernels.triton.products import KINDS, MAGIC
from mixoff.kernels.triton.tiles import OLDEST
from mixoff.quantize.strided import BLOCK, StridedTensor

ROWS = 2  # rows of activations per program
SUMS = 16  # sums per program, outputs times rows; for each of a thread's four words they take 64 registers
WORDS, WARPS = 512, 4  # per program: four words of codes per thread, one 16-byte load
WEIGHT_WORDS, WEIGHT_WARPS = 512, 4  # the same per program that dequantizes


def serves(x: torch.Tensor, w: StridedTensor) -> bool:
    """Whether this module can compute `x @ w.T`: decided by form, dtype, device, chip and triton's presence alone."""
    columns = w.matrices[0]["meta.scale_q"].shape[1]  # C
    fitting = w.shape[1] % 4 == 0 and columns % 4 == 0 and x.dtype in KINDS
    here = fitting and x.device.type in products.DEVICES and products.loops() is not None
    return here and products.chip(x.device) >= OLDEST and x.device not in products.REFUSED


def linear(x: torch.Tensor, w: StridedTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`x @ w.T` for x (T, K) and w (N, K), in x's dtype or the one given -> (T, N); `serves(x, w)` must hold."""
    T, (N, K) = x.shape[0], w.shape
    out = x.new_empty(T, N, dtype=dtype or x.dtype)
    rows, packed, stored = ROWS if T > 1 else 1, products.activations(x), products.storage(out)
    named = {"KIND": KINDS[x.dtype], "OUT": KINDS[out.dtype]} | settings(w.form.bits, w.form.group_size, rows)
    with products.on(x.device):
        for i, parts in enumerate(w.matrices):
            grid = (-(-T // rows), w.step, named["HEIGHT"] // named["P"])
            found, first = arguments(parts), i * (N // len(w.matrices))
            columns = parts["meta.scale_q"].shape[1]
            products.loops().strided[grid](packed, *found, stored, T, N, K, w.step, columns, first, MAGIC, **named)
    return out


def dense(x: torch.Tensor, w: StridedTensor) -> torch.Tensor:
    """`x @ w.T` by way of weights in x's dtype, a chunk of outputs at a time, in the scratch that `reference` has."""
    out = x.new_empty(x.shape[0], w.shape[0])  # (T, N)
    N, chunk = w.shape[0] // len(w.matrices), BLOCK * DEQUANTIZED // x.element_size()
    scratch = x.new_empty(min(chunk, N), w.shape[1])
    for i in range(len(w.matrices)):
        for first in range(0, N, chunk):
            weights = scratch[: min(chunk, N - first)]  # (outputs, K)
            dequantize(w, i, first, weights)
            torch.mm(x, weights.t(), out=out[:, i * N + first : i * N + first + len(weights)])  # (T, outputs)
    return out


def dequantize(w: StridedTensor, matrix: int, first: int, out: torch.Tensor) -> None:
    """Weights of some outputs of one of the weight's matrices, from `first` on, into out (outputs, K)."""
    parts, (outputs, K) = w.matrices[matrix], out.shape
    grid = (outputs, -(-K // (4 * WEIGHT_WORDS)))
    with products.on(out.device):
        products.loops().strided_weights[grid](
            *arguments(parts), products.storage(out), K, w.step, parts["meta.scale_q"].shape[1], first, MAGIC,
            BITS=w.form.bits, HEIGHT=len(parts["W_q"]), OUT=KINDS[out.dtype], BW=WEIGHT_WORDS, num_warps=WEIGHT_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip


# What a launch needs --------------------------------------------------------------------------------------------------


def settings(bits: int, group: int, rows: int) -> dict:
    """Constants and options of a launch: rows of codes in total, rows per program, and words per row.

    >>> settings(2, 16, 1)["P"], settings(4, 64, 1)["P"], settings(4, 64, 1)["HEIGHT"]
    (4, 8, 32)
    """
    height = group * bits // 8
    constants = {"BITS": bits, "HEIGHT": height, "P": min(height, SUMS // rows * bits // 8)}
    return constants | {"BW": WORDS, "ROWS": rows, "num_warps": WARPS, "enable_fp_fusion": True}


def arguments(parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """One matrix as the kernels read it, in 32-bit words: codes, scales, zeros, grids, the zeros' two numbers."""
    names = ("W_q", "meta.scale_q", "meta.zero_q", "meta.meta_scale.scale", "meta.meta_scale.zero")
    scale, zero = parts["meta.meta_zero.scale"], parts["meta.meta_zero.zero"]
    return *(words(parts[name]) for name in names), words(numbers(scale, zero))


def words(part: torch.Tensor) -> torch.Tensor:
    """A part as words, in place; copied if it begins between two words, which does not happen in a store."""
    part = part.reshape(-1)
    return (part.clone() if part.data_ptr() % 4 else part).view(torch.int32)


def numbers(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Two fp16 numbers next to each other (2,): without a copy if they already are, as in a slot."""
    if zero.data_ptr() == scale.data_ptr() + scale.element_size():
        return scale.as_strided((2,), (1,))
    return torch.stack((scale, zero))

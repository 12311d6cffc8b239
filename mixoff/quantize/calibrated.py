"""Calibrated quantization: codes that preserve a matrix's outputs on the inputs it gets, rather than its weights.

Letters: **N** outputs (rows), **K** inputs (columns), **G** group size, **B** blocks of a Hessian, **R** outputs of a
block of the format (128 or fewer). The Hessian H = Σ v² x xᵀ adds up over calibration tokens, with x the inputs of the
matrix and v the weight of the router. The error is tr(dW H dWᵀ), dW = approximation less weights.

The result is a `QTensor` like any other: same layout, bytes and kernels. Where Hessians come from is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mixoff.errors import MixoffError
from mixoff.quantize.layout import BLOCK, WIDTH
from mixoff.quantize.scheme import Precision
from mixoff.quantize.solve import block_arrays, check_range, quantize, quantize_block
from mixoff.quantize.tensor import QTensor

PANEL = 128  # inputs between two products with the rest of a block; a multiple of every group size
LEAST_DAMPING, MOST_DAMPING, TOKENS_SCALE = 0.01, 0.6, 4.1  # through 0.01 at 17 tokens per input, 0.1 at 7, 0.4 at 1.7
SMALLEST = 256  # triangles up to this size are inverted in one piece


# Hessians -------------------------------------------------------------------------------------------------------------


def damping(tokens: float, inputs: int) -> float:
    """How much of its mean diagonal is added to a Hessian that was summed over so many tokens.

    The fewer tokens per input, the more of a Hessian is chance. The rule passes through values that were best for the
    bundled model: 0.01 at 17 tokens per input, 0.1 at 7, and 0.3 to 1 at 1.7.

    >>> [round(damping(tokens, 1), 3) for tokens in (1.7, 7, 17, 100)]
    [0.396, 0.109, 0.01, 0.01]
    """
    return max(LEAST_DAMPING, MOST_DAMPING * math.exp(-tokens / inputs / TOKENS_SCALE))


def shrink(hessian: Tensor, layer_hessian: Tensor, tokens: float) -> Tensor:
    """An expert's Hessian pulled towards that of its layer, the more so the fewer tokens reached the expert.

    With K inputs and a = tokens / (tokens + K), it is a H / tr H + (1 - a) L / tr L, times tr H (tr L if no token
    reached the expert, so that L itself is returned). Either Hessian is (K, K) or (B, K/B, K/B).
    """
    own, common = _trace(hessian), _trace(layer_hessian)
    if not own > 0 or not common > 0:
        return hessian if own > 0 else layer_hessian
    inputs = hessian.shape[-1] * (len(hessian) if hessian.dim() == 3 else 1)
    share = tokens / (tokens + inputs)
    return share * hessian + ((1 - share) * own / common) * layer_hessian


def _trace(hessian: Tensor) -> float:
    return hessian.diagonal(dim1=-2, dim2=-1).double().sum().item()


class Metric:
    """A damped Hessian (K, K), factored: what errors cost.

    - hessian: (K, K), or B blocks on its diagonal (B, K/B, K/B), where all of it would cost too much; only the lower
      triangle of each is read.
    - damping: share of the mean diagonal that is added to the diagonal. Inputs that are always zero need it.

    Attributes, fp32, one item per block: `damped`, the damped Hessian; `inverse`, the lower T in H⁻¹ = T Tᵀ; `root`,
    the lower S = T⁻¹ in H = Sᵀ S.

    Raises MixoffError for a Hessian that is not finite, zero, or not positive definite.
    """

    def __init__(self, hessian: Tensor, damping: float = LEAST_DAMPING) -> None:
        blocks = hessian[None] if hessian.dim() == 2 else hessian
        _check(blocks, damping)
        ridge = damping * blocks.diagonal(dim1=1, dim2=2).double().mean().item()
        self.damped, self.root, self.inverse = [], [], []
        for block in blocks:
            block = block.double().tril()
            block += block.tril(-1).T
            block.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(block.flip(0, 1))
            if failed:
                raise MixoffError(
                    f"the Hessian is not positive definite with a damping of {damping:g}: raise the damping, or check "
                    "that it is a sum of x xᵀ"
                )
            factor = factor.float()
            self.damped.append(block.float())
            self.root.append(factor.flip(0, 1).T.contiguous())
            self.inverse.append(_inverse(factor).flip(0, 1).T.contiguous())
        self.importance = torch.cat([1 / lower.diagonal() ** 2 for lower in self.inverse])  # (K,)

    @property
    def inputs(self) -> int:
        """K."""
        return len(self.importance)

    @property
    def size(self) -> int:
        """K/B."""
        return len(self.damped[0])

    def panels(self, width: int = PANEL) -> Iterator[tuple[int, int, int]]:
        """Number of the block, first input inside the block, and end, of each panel of `width` inputs or fewer."""
        for number in range(len(self.damped)):
            yield from ((number, at, min(at + width, self.size)) for at in range(0, self.size, width))

    def error(self, difference: Tensor) -> float:
        """tr(dW H dWᵀ) for the damped H and dW (N, K)."""
        parts = zip(difference.float().split(self.size, 1), self.root, strict=True)
        return sum((part @ root.T).double().square().sum().item() for part, root in parts)

    def exceeds(self, difference: Tensor, limit: float) -> bool:
        """Whether the error of dW, inputs first (K, R), is above `limit`; mostly known from a part of the inputs."""
        error = 0.0
        for number, at, end in self.panels():
            first = number * self.size
            part = self.root[number][at:end, :end] @ difference[first : first + end]  # (P, R)
            error += part.square().sum(dtype=torch.float64).item()
            if error > limit:
                return True
        return False


def _check(hessian: Tensor, damping: float) -> None:
    """Raise MixoffError, with the cause, for what cannot be a Hessian (B, K/B, K/B)."""
    if hessian.dim() != 3 or hessian.shape[1] != hessian.shape[2] or not hessian.numel():
        raise MixoffError(f"a Hessian is (K, K) or (B, K/B, K/B), not {tuple(hessian.shape)}")
    if not damping >= 0 or not math.isfinite(damping):
        raise MixoffError(f"damping is {damping!r}: give a share of the mean diagonal, such as {LEAST_DAMPING}")
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if wrong := int((~hessian.isfinite()).sum()):
        raise MixoffError(
            f"{wrong:,} of {hessian.numel():,} numbers of the Hessian are NaN or infinity: the activations overflowed, "
            "so calibrate in bf16 or fp32"
        )
    if diagonal.min() < 0:
        raise MixoffError(f"the Hessian's diagonal holds {diagonal.min().item():.4g}: it is not a sum of squares")
    if not diagonal.any():
        raise MixoffError("the Hessian is zero: no token reached this matrix; use its layer's Hessian, or `quantize`")


def _inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower triangle, by halves: a third of the work of solving for each column."""
    half = len(lower) // 2
    if len(lower) <= SMALLEST:
        return torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False)
    out = torch.zeros_like(lower)
    out[:half, :half], out[half:, half:] = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    torch.mm(out[half:, half:] @ lower[half:, :half], out[:half, :half], out=out[half:, :half]).neg_()
    return out


# Quantizing -----------------------------------------------------------------------------------------------------------


def quantize_calibrated(
    w: Tensor,
    hessian: Tensor | Metric,
    precision: Precision,
    metadata_bits: int = 8,
    *,
    damping: float = LEAST_DAMPING,
    sweeps: int = 0,
    each: Callable = map,
) -> QTensor:
    """Quantize a matrix (N, K), fp32, fp16 or bf16, for the least error tr(dW H dWᵀ) of its outputs.

    - w: the matrix.
    - hessian: H, or a `Metric`, which can serve several matrices with the same inputs.
    - precision: bits per code and group size.
    - metadata_bits: bits of each scale and minimum, 8 or 16.
    - damping: as in `Metric`; the function `damping` has a rule.
    - sweeps: passes of `descend` after the error feedback; each lowers the error a little more.
    - each: `map`, or a thread pool's `map`, over blocks of 128 rows.

    Inputs are rounded in order, and each error is made up for by the inputs that follow: `W_k -= e T_kj` with
    `e = (w - ŵ) / T_jj` (GPTQ, Frantar et al., arXiv 2210.17323, section 3). On reaching a group, its lines are fitted
    by least squares with weights 1/T_jj², and rounded to 8 bits at once. Blocks of outputs in which data-free `lsq` has
    the smaller error get that, so the result is never worse.

    The same bits for the same input, machine and number of threads. Needs numba.
    Raises MixoffError as `quantize` and `Metric` do. Tested against GPTQ written out in fp64, and brute force.
    """
    metric = hessian if isinstance(hessian, Metric) else Metric(hessian, damping)
    q = QTensor.empty(tuple(w.shape), precision.bits, precision.group_size, metadata_bits)
    _check_fit(w, metric, precision.group_size)
    for _ in each(lambda rows: _quantize_block(w.detach(), metric, q, rows, sweeps), q.blocks()):
        pass
    return q.to(w.device)


def descend(q: QTensor, w: Tensor, metric: Metric, sweeps: int = 1, each: Callable = map) -> None:
    """Lower the error of `q` (N, K) to weights `w`, in place, whatever solver it is from.

    A sweep passes through the groups of inputs. It solves for the scales and minima that are best for their codes, kept
    where they lower the error once rounded; then it moves each code to its best value, given all others. The error
    never rises.
    """
    _check_fit(w, metric, q.group_size)
    for _ in each(lambda rows: _descend_block(w.detach(), metric, q, rows, sweeps), q.blocks()):
        pass


def _check_fit(w: Tensor, metric: Metric, group_size: int) -> None:
    """Raise MixoffError unless weights and Hessian belong together."""
    if w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise MixoffError(f"weights are fp32, fp16 or bf16 tensors, not {w.dtype}")
    if w.shape[1] != metric.inputs:
        raise MixoffError(f"the matrix has {w.shape[1]} inputs, and the Hessian {metric.inputs}")
    if metric.size % group_size:
        raise MixoffError(
            f"a group of {group_size} does not divide a Hessian's block of {metric.size}: use fewer blocks"
        )
    check_range(w)


def _loops() -> ModuleType:
    try:
        from mixoff.quantize import calibrated_numba
    except ImportError:
        raise MixoffError("calibrated quantization needs numba: pip install numba") from None
    return calibrated_numba


def _quantize_block(w: Tensor, metric: Metric, q: QTensor, rows: tuple[int, int], sweeps: int) -> None:
    """Quantize a block of rows of `w` (N, K) into `q`."""
    start, stop = rows
    free = quantize(w[start:stop], q.bits, q.group_size, "lsq", q.metadata_bits)
    error = _feed_back(w, metric, q, rows)
    if not metric.exceeds((free.dequantize() - w[start:stop].float()).T, error):
        quantize_block(w, q, start, stop, "lsq")
    _descend_block(w, metric, q, rows, sweeps)


def _feed_back(w: Tensor, metric: Metric, q: QTensor, rows: tuple[int, int]) -> float:
    """Quantize a block of rows of `w` (N, K) into `q` with error feedback; return its error."""
    start, stop = rows
    feed_back = _loops().compiled()[0]
    values = w[start:stop].T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # (K, R)
    errors, codes = torch.empty(metric.size, stop - start), np.empty(values.shape, np.uint8)
    lines = np.empty((2, values.numel() // q.group_size), np.float32)
    store, form = block_arrays(q, start, stop)[2:], (q.group_size, 2**q.bits - 1)
    width = PANEL if stop - start == BLOCK else metric.size  # grids of a narrow block span groups of several panels
    error = 0.0
    for number, at, end in metric.panels(width):
        first, factor = number * metric.size, metric.inverse[number]
        panel, square = values[first + at : first + end], factor[at:end, at:end].contiguous()
        panel.addmm_(factor[at:end, :at], errors[:at], alpha=-1)
        arrays = values.numpy(), metric.importance.numpy(), square.numpy(), first + at, form, codes
        feed_back(*arrays, (lines[0], lines[1]), store, errors[at:end].numpy())
        error += errors[at:end].square().sum(dtype=torch.float64).item()
    _pack(q, start, stop, codes)
    return error


def _descend_block(w: Tensor, metric: Metric, q: QTensor, rows: tuple[int, int], sweeps: int) -> None:
    """`descend` for a block of rows."""
    if not sweeps:
        return
    start, stop = rows
    loop = _loops().compiled()[1]
    codes = q._codes(start, stop).to(torch.uint8).contiguous().numpy()  # (K, R)
    lines = tuple(line.flatten().contiguous().numpy() for line in q._metadata(start, stop))
    store, form = block_arrays(q, start, stop)[2:], (q.group_size, 2**q.bits - 1)
    for _ in range(sweeps):
        drift = q.block_weights(start, stop).T.contiguous() - w[start:stop].T.float()  # (K, R)
        for number, at, end in metric.panels():
            first, hessian = number * metric.size, metric.damped[number]
            gradient = hessian[at:end] @ drift[first : first + metric.size]  # (P, R)
            square = hessian[at:end, at:end].contiguous().numpy()
            loop(gradient.numpy(), square, first + at, form, codes, drift.numpy(), lines, store)
        _pack(q, start, stop, codes)


def _pack(q: QTensor, start: int, stop: int, codes: np.ndarray) -> None:
    """Pack codes (K, R) into the words of a block."""
    words, high = block_arrays(q, start, stop)[:2]
    pack = _loops().compiled()[2]
    pack(codes, 0, WIDTH[q.bits], words)
    if q.bits == 3:
        pack(codes, 2, 1, high)

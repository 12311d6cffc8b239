"""Hessians: second moments of the inputs that a matrix gets, by which errors of its weights are measured.

Letters: **T** tokens, **N** outputs, **K** inputs, **B** blocks on a Hessian's diagonal, **P** inputs of a panel, **R**
outputs of a block. The Hessian of a matrix is H = Σ v² x xᵀ over tokens, where x are its inputs and v is the router's
weight for its expert. Errors dW (N, K) of the weights cost tr(dW H dWᵀ), the squared error of what the matrix puts out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mixoff.errors import MixoffError

PANEL = 128  # inputs between two products with the rest of a block; a multiple of every group size
LEAST_DAMPING, MOST_DAMPING, TOKENS_SCALE = 0.01, 0.6, 4.1  # through 0.01 at 17 tokens per input, 0.1 at 7, 0.4 at 1.7
SMALLEST = 256  # inputs up to which squares are formed, and triangles inverted, in one piece
ASYMMETRY = 1e-3  # of the largest diagonal, that rounding may cause
CHUNK = 2048  # tokens whose sum is formed in fp32


def add_moment(total: Tensor, a: Tensor, x: Tensor, gate: Tensor | None = None) -> None:
    """Add Σ v² a xᵀ over tokens to `total`, in place: with a = x, a Hessian.

    - total: (A, K), fp32 or fp64; or (B, A/B, K/B), the blocks on the diagonal alone, for large K.
    - a, x: (T, A) and (T, K).
    - gate: the router's weights v (T,); None for 1.

    Sums over 2048 tokens are formed in fp32, and added in the dtype of `total`.
    """
    blocks = total[None] if total.dim() == 2 else total
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        left = right = x[rows].float()
        if gate is not None:
            left = right = right * gate[rows].float()[:, None]
        if a is not x:
            left = a[rows].float() if gate is None else a[rows].float() * gate[rows].float()[:, None]
        pairs = zip(blocks, left.chunk(len(blocks), 1), right.chunk(len(blocks), 1), strict=True)
        for block, outputs, inputs in pairs:
            if a is x:
                _add_square(block, inputs)
            else:
                block += outputs.T @ inputs


def _add_square(total: Tensor, x: Tensor) -> None:
    """Add xᵀ x to `total` (K, K), by halves: the other triangle is the mirror image, so half of the work is saved."""
    half = x.shape[1] // 2
    if x.shape[1] <= SMALLEST:
        total += x.T @ x
        return
    corner = x[:, half:].T @ x[:, :half]
    total[half:, :half] += corner
    total[:half, half:] += corner.T
    _add_square(total[:half, :half], x[:, :half])
    _add_square(total[half:, half:], x[:, half:])


def damping(tokens: float, inputs: int) -> float:
    """The share of its mean diagonal to add to a Hessian that is a sum over so many tokens: those of one expert.

    The fewer tokens per input, the more of a Hessian is chance. The rule passes through values that were best for the
    bundled model: 0.01 at 17 tokens per input, 0.1 at 7, and 0.3 to 1 at 1.7. There, 1.7 tokens per input lowered the
    divergence from 228 to 198 millinats with this rule, and raised it to 265 with 0.01 (measured, 2 bits).

    >>> [round(damping(tokens, 1), 3) for tokens in (1.7, 7, 17, 100)]
    [0.396, 0.109, 0.01, 0.01]
    """
    return max(LEAST_DAMPING, MOST_DAMPING * math.exp(-tokens / inputs / TOKENS_SCALE))


def shrink(hessian: Tensor, layer_hessian: Tensor, tokens: float) -> Tensor:
    """An expert's Hessian pulled towards that of its layer, the more so the fewer tokens reached the expert.

    With K inputs and a = tokens / (tokens + K), it is a H / tr H + (1 - a) L / tr L, times tr H (tr L if no token
    reached the expert, so that L itself is returned). Both are (K, K) or (B, K/B, K/B).
    """
    if hessian.shape != layer_hessian.shape:
        raise MixoffError(
            f"an expert's Hessian is {tuple(hessian.shape)}, and its layer's {tuple(layer_hessian.shape)}"
        )
    own, common = unit(hessian), unit(layer_hessian)
    if own == 0 or common == 0:
        return hessian if common == 0 else layer_hessian
    inputs = hessian.shape[-1] * (len(hessian) if hessian.dim() == 3 else 1)
    share = tokens / (tokens + inputs)
    return share * hessian + ((1 - share) * own / common) * layer_hessian


def factored(hessian: Tensor, damping: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Each block of a Hessian, damped, fp64, and the lower Cholesky factor of the block read backwards, fp32.

    Both are in units of the mean diagonal, so that fp32 suffices for any Hessian. Backwards, because H = C Cᵀ with C
    upper triangular is what leads from the first input to the last. Arguments and errors are those of `Metric`.
    """
    blocks = (hessian[None] if hessian.dim() == 2 else hessian).cpu()
    _check(blocks, damping)
    for part in blocks:
        block = part.to(torch.float64, copy=True).div_(unit(blocks))
        block.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(block.flip(0, 1))
        if failed:
            raise MixoffError(
                f"the Hessian is not positive definite with a damping of {damping:g}: raise the damping, or check that "
                "it is a sum of x xᵀ"
            )
        yield block, factor.float()


def unit(hessian: Tensor) -> float:
    """The mean of a Hessian's diagonal."""
    return hessian.diagonal(dim1=-2, dim2=-1).double().mean().item()


def _check(hessian: Tensor, damping: float) -> None:
    """Raise MixoffError, with the cause, for what cannot be a Hessian (B, K/B, K/B)."""
    if hessian.dim() != 3 or hessian.shape[1] != hessian.shape[2] or not hessian.numel():
        raise MixoffError(f"a Hessian is (K, K) or (B, K/B, K/B), not {tuple(hessian.shape)}")
    if not damping >= 0 or not math.isfinite(damping):
        raise MixoffError(f"damping is {damping!r}: give a share of the mean diagonal, such as {LEAST_DAMPING}")
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if not torch.stack(torch.aminmax(hessian)).isfinite().all():
        wrong = int((~hessian.isfinite()).sum())
        raise MixoffError(
            f"{wrong:,} of {hessian.numel():,} numbers of the Hessian are NaN or infinity: the activations overflowed, "
            "so calibrate in bf16 or fp32"
        )
    if diagonal.min() < 0:
        raise MixoffError(f"the Hessian's diagonal holds {diagonal.min().item():.4g}: it is not a sum of squares")
    if (hessian[:, 0] - hessian[:, :, 0]).abs().max() > ASYMMETRY * diagonal.max():
        raise MixoffError("the Hessian's first row is not its first column: give both triangles of Σ x xᵀ")
    if not diagonal.any():
        raise MixoffError("the Hessian is zero: no token reached this matrix; use its layer's Hessian, or `quantize`")


class Metric:
    """A damped Hessian (K, K), factored: what errors cost.

    - hessian: (K, K), or B blocks on its diagonal (B, K/B, K/B), where all of it would cost too much.
    - damping: share of the mean diagonal that is added to the diagonal. Inputs that are always zero need it.

    Attributes: `unit`, the mean diagonal; and in this unit, fp32, one item per block: `damped`, the damped Hessian;
    `inverse`, the lower T in H⁻¹ = T Tᵀ; `root`, the lower S = T⁻¹ in H = Sᵀ S. Last, `importance` (K,), 1/T_jj².

    Raises MixoffError for a Hessian that is not finite, zero, or not positive definite.
    """

    def __init__(self, hessian: Tensor, damping: float = LEAST_DAMPING) -> None:
        self.damped, self.root, self.inverse = [], [], []
        for block, factor in factored(hessian, damping):
            self.damped.append(block.float())
            self.root.append(factor.flip(0, 1).T.contiguous())
            self.inverse.append(_inverse(factor).flip(0, 1).T.contiguous())
        self.unit = unit(hessian)
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
        return self.unit * sum((part @ root.T).double().square().sum().item() for part, root in parts)

    def exceeds(self, difference: Tensor, limit: float) -> bool:
        """Whether the error of dW, inputs first (K, R), is above `limit`; mostly known from a part of the inputs."""
        error, limit = 0.0, limit / self.unit
        for number, at, end in self.panels():
            first = number * self.size
            part = self.root[number][at:end, :end] @ difference[first : first + end]  # (P, R)
            error += part.square().sum(dtype=torch.float64).item()
            if error > limit:
                return True
        return False


def _inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower triangle, by halves: a third of the work of solving for each column."""
    half = len(lower) // 2
    if len(lower) <= SMALLEST:
        return torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False)
    out = torch.zeros_like(lower)
    out[:half, :half], out[half:, half:] = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    torch.mm(out[half:, half:] @ lower[half:, :half], out[:half, :half], out=out[half:, :half]).neg_()
    return out

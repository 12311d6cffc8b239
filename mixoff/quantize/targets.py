"""Weights to aim for when what comes before a matrix is already quantized, so that it makes up for earlier errors.

Letters: **N** outputs, **K** inputs. In a model that is quantized layer by layer, a matrix gets inputs x̂ where it would
have got x, and the residual stream is off by r = original less quantized. The functions take moments, which
`hessian.add_moment` sums over tokens in any number of pieces, weighted by v², the square of the router's weight:

- gram: Σ v² x̂ x̂ᵀ, (K, K) or the blocks on its diagonal (B, K/B, K/B).
- drift: Σ v² (x - x̂) x̂ᵀ, of the same shape.
- residual: Σ v² r x̂ᵀ, (N, K).

Both targets go only a part of the way, because moments of few tokens are uncertain, and later layers also make up for
errors: the defaults were best for the bundled model. Quantize a target with `gram` as the Hessian. Tested against least
squares, solved directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixoff.errors import MixoffError
from mixoff.quantize.hessian import factored, unit

DRIFT_SHARE, RESIDUAL_SHARE = 0.5, 0.5  # α and ρ
DRIFT_DAMPING, RESIDUAL_DAMPING = 0.05, 0.1  # of gram's mean diagonal


def corrected(
    w: Tensor, gram: Tensor, drift: Tensor, share: float = DRIFT_SHARE, damping: float = DRIFT_DAMPING
) -> Tensor:
    """Weights, fp32 (N, K), that give on x̂ what `w` (N, K) gives on x: `W + α W D (G + δ)⁻¹`.

    With G = gram, D = drift and no damping, α = 1 minimizes Σ v² |W x - W* x̂|². Asymmetric calibration, as in GPTAQ (Li
    et al., arXiv 2504.02692).
    """
    _check(drift.shape == gram.shape, f"drift is {tuple(drift.shape)}, and gram {tuple(gram.shape)}")
    blocks = drift[None] if drift.dim() == 2 else drift
    inputs = blocks.shape[0] * blocks.shape[-1]
    _check(w.shape[-1] == inputs, f"the matrix has {w.shape[-1]} inputs, and gram {inputs}")
    out = w.float().clone()
    for part, block, (_, factor) in zip(out.chunk(len(blocks), 1), blocks, factored(gram, damping), strict=True):
        part += share * (part @ _solved(block / unit(gram), factor))
    return out


def compensated(
    w: Tensor, gram: Tensor, residual: Tensor, share: float = RESIDUAL_SHARE, damping: float = RESIDUAL_DAMPING
) -> Tensor:
    """Weights, fp32 (N, K), that also give back what the residual stream lacks: `W + ρ M (G + δ)⁻¹`.

    With G = gram, M = residual and no damping, ρ = 1 minimizes Σ v² |r - (W* - W) x̂|²: for the down projection, after
    `corrected`. With blocks, each block of inputs answers for the whole residual, so divide ρ by their number.
    """
    _check(residual.shape == w.shape, f"residual is {tuple(residual.shape)}, and the matrix {tuple(w.shape)}")
    out, factors = w.float().clone(), [factor for _, factor in factored(gram, damping)]
    for part, block, factor in zip(out.chunk(len(factors), 1), residual.chunk(len(factors), 1), factors, strict=True):
        part += share * _solved(block / unit(gram), factor)
    return out


def _solved(block: Tensor, factor: Tensor) -> Tensor:
    """`block @ (G + δ)⁻¹` for the factor that `factored` has of G + δ, all in units of G's mean diagonal."""
    return torch.cholesky_solve(block.float().flip(1).T, factor).T.flip(1)


def _check(fits: bool, message: str) -> None:
    if not fits:
        raise MixoffError(f"{message}: these moments are not of this matrix")

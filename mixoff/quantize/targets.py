"""Weights to aim for when what comes before a matrix is already quantized, so that it makes up for earlier errors.

Letters: **N** outputs, **K** inputs. In a model that is quantized layer by layer, a matrix gets inputs x̂ where it would
have got x, and the residual stream is off by r = original less quantized. The functions take moments, which
`hessian.add_moment` sums over tokens in any number of pieces, weighted by v², the square of the router's weight:

- gram: Σ v² x̂ x̂ᵀ, (K, K) or the blocks on its diagonal (B, K/B, K/B).
- drift: Σ v² (x - x̂) x̂ᵀ, of the same shape.
- residual: Σ v² r x̂ᵀ, (N, K).

Quantize a target with `gram` as the Hessian. Tested against least squares, solved directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixoff.errors import MixoffError
from mixoff.quantize.hessian import factored, unit

DRIFT_SHARE, RESIDUAL_SHARE = 0.5, 0.5  # α and ρ, best for the bundled model: moments of few tokens are uncertain
DAMPING = 0.1  # δ, of gram's mean diagonal


def aimed(
    w: Tensor,
    gram: Tensor,
    drift: Tensor | None = None,
    residual: Tensor | None = None,
    drift_share: float = DRIFT_SHARE,
    residual_share: float = RESIDUAL_SHARE,
    damping: float = DAMPING,
) -> Tensor:
    """Weights, fp32 (N, K), to aim for in place of `w` (N, K): `W + (α W D + ρ M / B) (G + δ)⁻¹`.

    With G = gram, D = drift, M = residual and no damping:

    - α = 1 minimizes Σ v² |W x - W* x̂|², so that W* gives on x̂ what `w` gives on x: asymmetric calibration, as in GPTAQ
      (Li et al., arXiv 2504.02692).
    - ρ = 1 minimizes Σ v² |r - (W* - W) x̂|², so that W* also gives back what the residual stream lacks: for the down
      projection. Each of B blocks of inputs answers for its part.

    Both go only a part of the way, because later layers also make up for errors.
    """
    _check(drift is None or drift.shape == gram.shape, "drift", drift, gram)
    _check(residual is None or residual.shape == w.shape, "residual", residual, w)
    _check(w.shape[-1] == gram.shape[-1] * (len(gram) if gram.dim() == 3 else 1), "the matrix", w, gram)
    out, scale = w.float().clone(), unit(gram)
    for b, (_, factor) in enumerate(factored(gram, damping)):
        columns = slice(b * len(factor), (b + 1) * len(factor))
        part, change = out[:, columns], torch.zeros(len(w), len(factor))
        if drift is not None:
            change.addmm_(part, ((drift if drift.dim() == 2 else drift[b]) / scale).float(), alpha=drift_share)
        if residual is not None:
            change.add_((residual[:, columns] / scale).float(), alpha=residual_share * len(factor) / w.shape[1])
        part += _solved(change, factor)
    return out


def _solved(block: Tensor, factor: Tensor) -> Tensor:
    """`block @ (G + δ)⁻¹` for the factor that `factored` has of G + δ, all in units of G's mean diagonal."""
    return torch.cholesky_solve(block.flip(1).T, factor).T.flip(1)


def _check(fits: bool, name: str, given: Tensor | None, of: Tensor) -> None:
    if not fits and given is not None:
        shapes = f"{tuple(given.shape)}, which does not fit {tuple(of.shape)}"
        raise MixoffError(f"{name} is {shapes}: these moments are not of this matrix")

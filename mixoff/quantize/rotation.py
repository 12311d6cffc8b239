"""A rotation of a matrix's inputs, which spreads outliers over 16 neighbours before anything is rounded.

Letters: **K** inputs, **R** the rotation, orthogonal: random signs, then a Hadamard matrix of 16 for each block of 16.
Stored is `W R`; at run time `x` becomes `x R`, and `(x R) (W R)^T = x W^T`. Signs follow from an input's index alone,
so nothing else is stored. Each rotated number takes four additions, always in the same order, so that compiled loops
and torch agree bit for bit. After QuaRot, Ashkboos et al., arXiv 2404.00456, which rotates whole widths.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mixoff.errors import MixoffError

BLOCK = 16  # inputs that are mixed
QUARTER = 0.25  # what makes the sum of 16 numbers with signs orthogonal: exact in every dtype
FIRST, SECOND = 0x9E3779B1, 0x85EBCA77  # odd multipliers of a hash (xxHash's primes), whose lowest bit is the sign


@functools.lru_cache(maxsize=16)
def signs(K: int, device: torch.device | str = "cpu") -> Tensor:
    """+-1/4 for each of K inputs, fp32 (K,).

    >>> (4 * signs(16)).int().tolist()
    [1, 1, 1, -1, 1, 1, -1, -1, -1, -1, -1, 1, -1, -1, -1, -1]
    """
    k = torch.arange(K, dtype=torch.int64) * FIRST & 0xFFFFFFFF
    k = (k ^ k >> 15) * SECOND & 0xFFFFFFFF
    return ((1 - 2 * ((k ^ k >> 13) & 1)) * QUARTER).to(torch.float32).to(device)


def rotate(x: Tensor) -> Tensor:
    """`x R` for x (..., K), fp32. Raises MixoffError unless K is a multiple of 16."""
    if x.dim() == 0 or x.shape[-1] % BLOCK:
        raise MixoffError(f"a rotation mixes {BLOCK} inputs: shape {tuple(x.shape)} does not divide into blocks of 16")
    return _mixed(x.float() * signs(x.shape[-1], x.device))


def unrotate(x: Tensor) -> Tensor:
    """`x R^T`, the inverse of `rotate` up to fp32's rounding, (..., K)."""
    return _mixed(x.float()) * signs(x.shape[-1], x.device)


def _mixed(x: Tensor) -> Tensor:
    """Each block of 16 times a Hadamard matrix: sums and differences of neighbours 8, 4, 2 and 1 apart."""
    for apart in (8, 4, 2, 1):
        first, second = x.unflatten(-1, (-1, 2, apart)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
    return x

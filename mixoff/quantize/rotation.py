"""rot16: a fixed rotation of a matrix's inputs, sixteen at a time, which spreads outliers before they are quantized.

Letters: **N** outputs, **K** inputs. The rotation is R = diag(signs) x blocks of Hadamard(16) / 4, so R Rᵀ = 1, and
`rotate(h) @ rotate_weight(W).T` equals `h @ W.T` except for rounding. A store keeps the rotated weight and one flag:
signs depend only on the number of the input, so they are the same for every layer, expert and machine.

Why outliers matter: QuaRot (Ashkboos et al., arXiv 2404.00456, section 4). Blocks of 16 cost four additions per number;
on the bundled model, blocks of 64 were no better.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixoff.errors import MixoffError

SIZE = 16  # inputs that are mixed
STRIDES = (1, 2, 4, 8)  # of the four stages, in this order
SCALE = 0.25  # 1 / sqrt(SIZE): a power of two, so it may be multiplied in before or after without changing a bit


@functools.cache
def signs(inputs: int) -> Tensor:
    """The sign of each input, fp32 (K,): -1 where the top bit of MurmurHash3's `fmix32` of its number is set.

    >>> signs(16).int().tolist()
    [1, 1, 1, -1, 1, -1, 1, 1, 1, -1, -1, -1, 1, -1, -1, -1]
    """
    h: np.ndarray = np.arange(inputs, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)  # modulo 2**32
    return torch.from_numpy(np.where(h >> np.uint32(31), np.float32(-1), np.float32(1)))


def rotate(x: Tensor) -> Tensor:
    """`x @ R` (..., K), in fp32: what a rotated weight is multiplied with.

    Each number is multiplied by its sign. Then, for the strides s = 1, 2, 4 and 8 in this order, every two numbers
    (a, b) that are s apart in a run of 2 s become (a + b, a - b), rounded to fp32. Last, each is multiplied by 1/4. Any
    loop that follows this order gives the same bits.

    >>> rotate(torch.eye(16)[0]).tolist() == [0.25] * 16
    True
    """
    _check(x)
    return _butterflies(x.float() * signs(x.shape[-1]).to(x.device))


def unrotate(x: Tensor) -> Tensor:
    """`x @ Rᵀ` (..., K), in fp32: the inverse of `rotate` except for rounding."""
    _check(x)
    return _butterflies(x.float()) * signs(x.shape[-1]).to(x.device)


def rotate_weight(w: Tensor) -> Tensor:
    """`w @ R`, fp32 (N, K), contiguous: the weight that takes rotated inputs. Rotate first, then quantize."""
    return rotate(w).contiguous()


def rotate_hessian(hessian: Tensor) -> Tensor:
    """`Rᵀ H R` (K, K), fp32: the Hessian of rotated inputs. Summing over rotated inputs is as good, and cheaper."""
    return rotate(rotate(hessian).T).T.contiguous()


def _check(x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] % SIZE:
        width = x.shape[-1] if x.dim() else 1
        raise MixoffError(f"rot16 mixes 16 inputs, and {width} is not a multiple of 16: store this matrix without it")


def _butterflies(x: Tensor) -> Tensor:
    """Blocks of Hadamard(16) / 4, in fp32 and in the order that `rotate` describes."""
    shape = x.shape
    for stride in STRIDES:
        pairs = x.reshape(-1, 2, stride)
        x = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1)
    return x.reshape(shape) * SCALE

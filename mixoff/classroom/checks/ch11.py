"""Exercises of notebooks/11_kernels.ipynb."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixoff.classroom import programs
from mixoff.classroom.checks.machinery import Check

WORDS = np.array([0x39393939, -1, -(2**31), 0x000000E4], np.int32)  # -1: sixteen threes; -2**31: the last code is 2

# (words of sixteen 2-bit codes, which of them) -> that code of every word
codes_at = Check(
    (
        ((WORDS, 0), [1, 3, 0, 0]),
        ((WORDS, 3), [0, 3, 0, 3]),
        ((WORDS, 6), [3, 3, 0, 0]),
        ((WORDS, 15), [0, 3, 2, 0]),
    ),
    slips={
        "The higher codes are still there: mask after the shift.": lambda words, i: words >> 2 * i,
        "A code takes two bits: shift by 2 i.": lambda words, i: words >> i & 3,
        "The mask took the other codes away before the shift could bring them down.": lambda words, i: (
            (words & 3) >> 2 * i
        ),
    },
)


class Scarce(float):
    """A scale or a minimum that counts its multiplications."""

    used = 0

    def __mul__(self, other: object) -> float:
        Scarce.used += 1
        return float.__mul__(self, float(other))  # type: ignore[arg-type]

    __rmul__ = __mul__


def scarce(folded: Callable, codes: np.ndarray, x: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> dict:
    """The product, and how often it multiplies by a scale or a minimum."""
    product = folded(codes, x, scale, minimum)
    Scarce.used = 0
    counting = (np.array([*map(Scarce, values)], dtype=object) for values in (scale, minimum))
    folded(codes, x, *counting)
    return {"product": product, "multiplications by scales and minima": Scarce.used}


def unfolded(codes: np.ndarray, x: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> float:
    """Every weight is made, and used once."""
    return ((codes * scale[:, None] + minimum[:, None]) * x).sum()


TIMES = "multiplications by scales and minima"

# (codes (groups, size), activations (groups, size), scales (groups,), minima (groups,)) -> product
folded = Check(
    (
        (
            (np.array([[0, 1, 2, 3]]), np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([0.5]), np.array([-1.0])),
            {"product": 0.0, TIMES: 2},
        ),
        (
            (np.array([[3, 0], [1, 2]]), np.array([[1.0, 5.0], [2.0, 2.0]]), np.array([2.0, 0.5]), np.array([0.0, 4])),
            {"product": 25.0, TIMES: 4},
        ),
        (
            (np.tile([0, 1, 2, 3], (3, 4)), np.ones((3, 16)), np.array([1.0, 2.0, 4.0]), np.array([-1.0, 0.0, -2.0])),
            {"product": 120.0, TIMES: 6},
        ),
    ),
    scarce,
    slips={
        "The product is right, but every weight was made: use each scale and each minimum once per group.": unfolded,
        "The minimum meets the sum of the activations, not their number.": lambda codes, x, scale, minimum: (
            scale @ (codes * x).sum(1) + minimum.sum() * x.shape[1]
        ),
    },
)


def product_of(
    kernel: Callable, words: np.ndarray, x: np.ndarray, scale: np.ndarray, minimum: np.ndarray, G: int
) -> dict:
    """What a kernel of one program per output computes, and the bytes of codes and results that it touches."""
    N, W = words.shape
    out = np.zeros(N, np.float32)
    traffic = programs.run(kernel, N, words=words, x=x, scale=scale, minimum=minimum, out=out, W=W, G=G)
    return {"out": out, "bytes of codes read": traffic["words read"], "bytes written": traffic["out written"]}


def matvec_case(N: int, W: int, G: int) -> tuple[tuple, dict]:
    """Numbers for which fp32 is exact."""
    rng = np.random.default_rng(10 * W + G)
    words = rng.integers(-(2**31), 2**31, (N, W)).astype(np.int32)
    x = rng.integers(-4, 5, 16 * W).astype(np.float32)
    scale = 2.0 ** rng.integers(-2, 2, (N, 16 * W // G)).astype(np.float32)
    minimum = -rng.integers(0, 4, (N, 16 * W // G)).astype(np.float32)
    codes = (words[:, :, None] >> 2 * np.arange(16) & 3).reshape(N, 16 * W)
    out = (codes * scale.repeat(G, 1) + minimum.repeat(G, 1)) @ x
    return (words, x, scale, minimum, G), {"out": out, "bytes of codes read": words.nbytes, "bytes written": 4 * N}


# a Triton kernel of one program per output: words (N, W), x (16 W,), scale and minimum (N, 16 W / G) -> out (N,)
matvec = Check((matvec_case(2, 2, 32), matvec_case(3, 4, 16), matvec_case(4, 4, 32)), product_of)

# (instructions per vector of codes, codes in it, instructions per group, group size, outputs per vector) -> per weight
instructions_per_weight = Check(
    (
        ((6, 8, 0, 64, 8), 0.75),
        ((15, 128, 9, 64, 8), 15 / 128 + 9 / 512),
        ((15, 128, 9, 16, 8), 15 / 128 + 9 / 128),
        ((7.5, 64, 8, 64, 8), 7.5 / 64 + 8 / 512),
    ),
    slips={
        "What is done once per group serves group_size * outputs weights.": lambda a, b, c, size, outputs: (
            a / b + c / size
        ),
        "The instructions per group are missing.": lambda a, b, c, size, outputs: a / b,
    },
)

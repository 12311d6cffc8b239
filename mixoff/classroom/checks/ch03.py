"""Exercises of notebooks/03_quantization.ipynb."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixoff.classroom.checks.machinery import Check


def ruler(w: np.ndarray, bits: int, rounding: Callable, steps: int | None = None) -> tuple:
    """Codes, scale and minimum of a group, with some rounding and some number of steps."""
    scale = (w.max() - w.min()) / (steps or 2**bits - 1) or 1.0
    return rounding((w - w.min()) / scale), scale, w.min()


# (weights (G,), bits) -> codes (G,), scale, minimum
quantize_group = Check(
    (
        ((np.array([0.0, 1.0, 2.0, 3.0]), 2), ([0, 1, 2, 3], 1.0, 0.0)),
        ((np.array([-1.0, 0.45, 0.6, 2.0]), 2), ([0, 1, 2, 3], 1.0, -1.0)),
        ((np.array([0.5, -0.25, 0.1]), 4), ([15, 0, 7], 0.05, -0.25)),
        ((np.array([0.7, 0.7]), 2), ([0, 0], 1.0, 0.7)),
    ),
    slips={
        "These codes are rounded down: round to nearest.": lambda w, bits: ruler(w, bits, np.floor),
        "b bits have 2**b marks, and 2**b - 1 steps between them.": lambda w, bits: ruler(
            w, bits, np.round, steps=2**bits
        ),
    },
)


def bytes_of(pack: Callable, codes: np.ndarray, bits: int) -> dict:
    """What the learner's `pack` returns, and its type."""
    packed = pack(codes, bits)
    return {"bytes": packed, "type": str(getattr(packed, "dtype", type(packed).__name__))}


def packed_downwards(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bytes with the first code in the highest bits."""
    return (codes.reshape(-1, 8 // bits) << np.arange(8 // bits)[::-1] * bits).sum(1).astype(np.uint8)


# (codes (n,), bits) -> bytes, the first code in the lowest bits
pack = Check(
    (
        ((np.array([1, 0, 0, 0]), 2), {"bytes": [1], "type": "uint8"}),
        ((np.array([0, 1, 2, 3]), 2), {"bytes": [228], "type": "uint8"}),
        ((np.array([3, 3, 3, 3, 0, 0, 0, 2]), 2), {"bytes": [255, 128], "type": "uint8"}),
        ((np.array([15, 1, 4, 10]), 4), {"bytes": [31, 164], "type": "uint8"}),
    ),
    bytes_of,
    slips={"The first code belongs into the lowest bits.": lambda codes, bits: packed_downwards(codes, bits)},
)

# (bytes, bits) -> codes
unpack = Check(
    (
        ((np.array([228], np.uint8), 2), [0, 1, 2, 3]),
        ((np.array([255, 128], np.uint8), 2), [3, 3, 3, 3, 0, 0, 0, 2]),
        ((np.array([31, 164], np.uint8), 4), [15, 1, 4, 10]),
    ),
    slips={
        "The first code comes from the lowest bits.": lambda packed, bits: (
            packed[:, None] >> np.arange(8 // bits)[::-1] * bits & (2**bits - 1)
        ).reshape(-1),
        "Mask what you shifted: a code has only its own bits.": lambda packed, bits: (
            packed[:, None] >> np.arange(8 // bits) * bits
        ).reshape(-1),
    },
)

# (bits, group size, bits of metadata) -> bits per weight
bits_per_weight = Check(
    (
        ((2, 16, 16), 4.0),
        ((4, 64, 16), 4.5),
        ((2, 16, 8), 2 + 1 + 0.03125),
        ((4, 64, 8), 4 + 0.25 + 0.0078125),
    ),
    slips={
        "Each group stores two numbers, scale and minimum.": lambda bits, group, metadata: bits + metadata / group,
        "With 8 bits, each 128 groups store four fp16 numbers more.": lambda bits, group, metadata: (
            bits + 2 * metadata / group
        ),
    },
)

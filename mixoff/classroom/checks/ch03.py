"""Exercises of notebooks/03_quantization.ipynb."""

from collections.abc import Callable

import numpy as np

from mixoff.classroom.checks.machinery import Check

# (weights (G,), bits) -> codes (G,), scale, minimum
quantize_group = Check(
    (
        ((np.array([0.0, 1.0, 2.0, 3.0]), 2), ([0, 1, 2, 3], 1.0, 0.0)),
        ((np.array([-1.0, 0.45, 0.6, 2.0]), 2), ([0, 1, 2, 3], 1.0, -1.0)),
        ((np.array([0.5, -0.25, 0.1]), 4), ([15, 0, 7], 0.05, -0.25)),
        ((np.array([0.7, 0.7]), 2), ([0, 0], 1.0, 0.7)),
    )
)


def bytes_of(pack: Callable, codes: np.ndarray, bits: int) -> dict:
    """What the learner's `pack` returns, and its type."""
    packed = pack(codes, bits)
    return {"bytes": packed, "type": str(getattr(packed, "dtype", type(packed).__name__))}


# (codes (n,), bits) -> bytes, the first code in the lowest bits
pack = Check(
    (
        ((np.array([1, 0, 0, 0]), 2), {"bytes": [1], "type": "uint8"}),
        ((np.array([0, 1, 2, 3]), 2), {"bytes": [228], "type": "uint8"}),
        ((np.array([3, 3, 3, 3, 0, 0, 0, 2]), 2), {"bytes": [255, 128], "type": "uint8"}),
        ((np.array([15, 1, 4, 10]), 4), {"bytes": [31, 164], "type": "uint8"}),
    ),
    bytes_of,
)

# (bytes, bits) -> codes
unpack = Check(
    (
        ((np.array([228], np.uint8), 2), [0, 1, 2, 3]),
        ((np.array([255, 128], np.uint8), 2), [3, 3, 3, 3, 0, 0, 0, 2]),
        ((np.array([31, 164], np.uint8), 4), [15, 1, 4, 10]),
    )
)

# (bits, group size, bits of metadata) -> bits per weight
bits_per_weight = Check(
    (
        ((2, 16, 16), 4.0),
        ((4, 64, 16), 4.5),
        ((2, 16, 8), 2 + 1 + 0.03125),
        ((4, 64, 8), 4 + 0.25 + 0.0078125),
    )
)

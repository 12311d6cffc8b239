"""Exercises of notebooks/03_quantization.ipynb."""

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

# (codes (n,), bits) -> bytes, the first code in the lowest bits
pack = Check(
    (
        ((np.array([1, 0, 0, 0]), 2), [1]),
        ((np.array([0, 1, 2, 3]), 2), [228]),
        ((np.array([3, 3, 3, 3, 0, 0, 0, 2]), 2), [255, 128]),
        ((np.array([15, 1, 4, 10]), 4), [31, 164]),
    )
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

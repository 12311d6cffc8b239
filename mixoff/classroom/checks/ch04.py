"""Exercises of notebooks/04_hqq.ipynb."""

import numpy as np

from mixoff.classroom.checks.machinery import Check

# (beta, p) -> largest error that HQQ's shrinkage sets to zero
threshold = Check((((10.0, 0.7), 10 ** (-1 / 1.3)), ((4.0, 0.0), 0.5), ((2.0, 1.0), 0.5)))

# (weights (G,), codes (G,), scale) -> zero
best_zero = Check(
    (
        ((np.array([0.0, 1.0]), np.array([1, 2]), 1.0), 1.0),
        ((np.array([-1.0, 0.5, 2.0]), np.array([0, 1, 3]), 1.0), 5 / 6),
        ((np.array([0.1, 0.3]), np.array([1, 4]), 0.1), 0.5),
        ((np.array([-0.04, 0.02]), np.array([0, 3]), 0.02), 2.0),
    )
)

# (original (N, K), restored (N, K)) -> restored, with each row scaled to unit gain
unit_gain = Check(
    (
        ((np.array([[1.0, 1.0]]), np.array([[0.5, 0.5]])), [[1.0, 1.0]]),
        ((np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([[1.0, 1.0], [2.0, 1.0]])), [[5 / 3, 5 / 3], [3.0, 1.5]]),
    )
)

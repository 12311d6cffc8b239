"""Exercises of notebooks/05_mixed_quantization.ipynb."""

import numpy as np

from mixoff.classroom.checks.machinery import Check

# (log-probabilities (T, V), row t for the token after t; tokens (T,)) -> perplexity
perplexity = Check(
    (
        ((np.log([[0.5, 0.5], [0.5, 0.5]]), np.array([0, 1])), 2.0),
        ((np.log([[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]]), np.array([0, 1, 1])), (0.75 * 0.1) ** -0.5),
        ((np.log(np.full((5, 4), 0.25)), np.array([3, 1, 0, 2, 2])), 4.0),
        ((np.log([[0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]]), np.array([0, 0, 1, 0])), 0.024 ** (-1 / 3)),
    )
)

# (losses of a (W,), losses of b (W,)) -> mean of b - a, and its standard error
paired = Check(
    (
        ((np.array([1.0, 2.0]), np.array([2.0, 3.0])), (1.0, 0.0)),
        ((np.array([1.0, 5.0, 3.0]), np.array([1.0, 6.0, 5.0])), (1.0, 3**-0.5)),
        ((np.array([2.0, 2.0, 2.0, 2.0]), np.array([1.0, 2.0, 1.0, 2.0])), (-0.5, 12**-0.5)),
    )
)

# (sizes, losses) -> indices of the points on the Pareto front
worth_having = Check(
    (
        (([1, 2], [5, 3]), [0, 1]),
        (([1, 2, 2], [5, 3, 4]), [0, 1]),
        (([3, 1, 2], [1, 4, 4]), [0, 1]),
        (([5, 4, 3, 3], [0, 2, 3, 1]), [0, 3]),
        (([2, 2], [7, 7]), [0, 1]),
    )
)

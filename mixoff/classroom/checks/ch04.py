"""Exercises of notebooks/04_hqq.ipynb."""

import numpy as np

from mixoff.classroom.checks.machinery import Check

# (beta, p) -> largest error that HQQ's shrinkage sets to zero
threshold = Check(
    (((10.0, 0.7), 10 ** (-1 / 1.3)), ((4.0, 0.0), 0.5), ((2.0, 1.0), 0.5)),
    slips={
        "What is subtracted depends on the error too: solve e = e**(p - 1) / beta.": lambda beta, p: 1 / beta,
    },
)

# (weights (G,), codes (G,), scale) -> zero
best_zero = Check(
    (
        ((np.array([0.0, 1.0]), np.array([1, 2]), 1.0), 1.0),
        ((np.array([-1.0, 0.5, 2.0]), np.array([0, 1, 3]), 1.0), 5 / 6),
        ((np.array([0.1, 0.3]), np.array([1, 4]), 0.1), 0.5),
        ((np.array([-0.04, 0.02]), np.array([0, 3]), 0.02), 2.0),
    ),
    slips={"The sign: from w = (q - z) s follows z = q - w / s.": lambda w, codes, scale: np.mean(w / scale - codes)},
)


def line(w: np.ndarray, codes: np.ndarray) -> tuple[float, float]:
    """Scale and minimum of the line through (code, weight) by least squares."""
    centred = codes - codes.mean()
    scale = (centred * w).sum() / (centred**2).sum()
    return scale, w.mean() - scale * codes.mean()


def error_in_place_of_gain(w: np.ndarray, codes: np.ndarray) -> tuple[float, float, float]:
    """The line, and its squared error."""
    scale, minimum = line(w, codes)
    return scale, minimum, ((w - minimum - scale * codes) ** 2).sum() / (w * w).sum()


def through_zero(w: np.ndarray, codes: np.ndarray) -> tuple[float, float, float]:
    """A line through the origin."""
    scale = (codes * w).sum() / (codes * codes).sum()
    return scale, 0.0, (w * codes).sum() * scale / (w * w).sum()


# (weights (G,), codes (G,)) -> scale and minimum by least squares, and the gain of what they restore
fit = Check(
    (
        ((np.array([0.0, 1.0, 2.0, 3.0]), np.array([0, 1, 2, 3])), (1.0, 0.0, 1.0)),
        ((np.array([1.0, -1.0, 1.0, -1.0]), np.array([0, 0, 1, 1])), (0.0, 0.0, 0.0)),
        ((np.array([-1.0, 0.0, 0.0, 2.0]), np.array([0, 1, 1, 2])), (1.5, -1.25, 0.95)),
        ((np.array([0.3, 0.5, 0.1]), np.array([2, 3, 0])), (0.9 / 7, 0.6 / 7, 1 - 1 / 122.5)),
    ),
    slips={
        "This is the squared error: the gain is 1 minus it.": error_in_place_of_gain,
        "The line need not pass through 0: fit the minimum too.": through_zero,
    },
)

# (original (N, K), restored (N, K)) -> restored, with each row scaled to unit gain
unit_gain = Check(
    (
        ((np.array([[1.0, 1.0]]), np.array([[0.5, 0.5]])), [[1.0, 1.0]]),
        ((np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([[1.0, 1.0], [2.0, 1.0]])), [[5 / 3, 5 / 3], [3.0, 1.5]]),
    ),
    slips={
        "One factor for the whole matrix: each row needs its own.": lambda w, r: r * (w * w).sum() / (w * r).sum(),
        "This makes rows equally long, which is not unit gain.": lambda w, r: (
            r * np.sqrt((w * w).sum(1, keepdims=True) / (r * r).sum(1, keepdims=True))
        ),
    },
)

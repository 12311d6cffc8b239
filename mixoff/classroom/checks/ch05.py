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
    ),
    slips={
        "Row t speaks of the token after t: compare it with ids[t + 1].": lambda logp, ids: np.exp(
            -logp[np.arange(len(ids)), ids].mean()
        ),
        "This is the loss: perplexity is its exponential.": lambda logp, ids: (
            -logp[np.arange(len(ids) - 1), ids[1:]].mean()
        ),
    },
)

# (losses of a (W,), losses of b (W,)) -> mean of b - a, and its standard error
paired = Check(
    (
        ((np.array([1.0, 2.0]), np.array([2.0, 3.0])), (1.0, 0.0)),
        ((np.array([1.0, 5.0, 3.0]), np.array([1.0, 6.0, 5.0])), (1.0, 3**-0.5)),
        ((np.array([2.0, 2.0, 2.0, 2.0]), np.array([1.0, 2.0, 1.0, 2.0])), (-0.5, 12**-0.5)),
    ),
    slips={
        "The mean was taken from the same differences: ddof=1.": lambda a, b: (
            (b - a).mean(),
            (b - a).std() / len(a) ** 0.5,
        ),
        "This error is unpaired: subtract first, then take the spread.": lambda a, b: (
            (b - a).mean(),
            np.hypot(a.std(ddof=1), b.std(ddof=1)) / len(a) ** 0.5,
        ),
        "How much more `b` loses is b - a.": lambda a, b: ((a - b).mean(), (a - b).std(ddof=1) / len(a) ** 0.5),
    },
)


def unbeaten(sizes: list, losses: list, equal: bool = False, both: bool = False) -> list[int]:
    """Indices that no other point beats, where an `equal` point beats too, or one has to be better in `both`."""
    points = list(zip(sizes, losses, strict=True))

    def beats(q: tuple, p: tuple) -> bool:
        return (q[0] < p[0] and q[1] < p[1]) if both else (q[0] <= p[0] and q[1] <= p[1] and (equal or q != p))

    others = [[q for j, q in enumerate(points) if j != i] for i in range(len(points))]
    return [i for i, p in enumerate(points) if not any(beats(q, p) for q in others[i])]


# (sizes, losses) -> indices of the points on the Pareto front
worth_having = Check(
    (
        (([1, 2], [5, 3]), [0, 1]),
        (([1, 2, 2], [5, 3, 4]), [0, 1]),
        (([3, 1, 2], [1, 4, 4]), [0, 1]),
        (([5, 4, 3, 3], [0, 2, 3, 1]), [0, 3]),
        (([2, 2], [7, 7]), [0, 1]),
    ),
    slips={
        "One of two equal points does not beat the other.": lambda sizes, losses: unbeaten(sizes, losses, equal=True),
        "Worse in one of the two and equal in the other is beaten too.": lambda sizes, losses: unbeaten(
            sizes, losses, both=True
        ),
    },
)

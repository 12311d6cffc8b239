"""Exercises of notebooks/01_router.ipynb."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixoff.classroom.checks.machinery import Check

# (scores (T, E), experts per token) -> experts, weights, both (T, k)
route = Check(
    (
        ((np.array([[0.0, 2.0, 1.0, -1.0]]), 1), ([[1]], [[1.0]])),
        ((np.log([[1.0, 3.0, 2.0]]), 2), ([[1, 2]], [[0.6, 0.4]])),
        ((np.log([[6.0, 1.0, 3.0], [1.0, 0.5, 4.0]]), 2), ([[0, 2], [2, 0]], [[2 / 3, 1 / 3], [0.8, 0.2]])),
        ((1000 + np.log([[4.0, 1.0]]), 2), ([[0, 1]], [[0.8, 0.2]])),
    )
)


def scale_by(e: int, rows: np.ndarray) -> np.ndarray:
    """An expert for tests, which multiplies by its number plus one."""
    return (e + 1) * rows


def calls_of(moe_layer: Callable, x: np.ndarray, experts: np.ndarray, weights: np.ndarray, expert_fn: Callable) -> dict:
    """The output of the learner's `moe_layer`, and which experts it called."""
    called: list[int] = []

    def counted(e: int, rows: np.ndarray) -> np.ndarray:
        called.append(int(e))
        return expert_fn(e, rows)

    output = moe_layer(x, experts, weights, counted)
    return {"output": output, "calls of experts": " ".join(map(str, sorted(called)))}


# (x (T, D), experts (T, K), weights (T, K), expert_fn) -> (T, D)
moe_layer = Check(
    (
        (
            (np.ones((1, 3)), np.array([[0, 1]]), np.array([[0.5, 0.5]]), scale_by),
            {"output": [[1.5, 1.5, 1.5]], "calls of experts": "0 1"},
        ),
        (
            (np.array([[1.0], [2.0]]), np.array([[3], [3]]), np.ones((2, 1)), scale_by),
            {"output": [[4.0], [8.0]], "calls of experts": "3"},
        ),
        (
            (np.array([[1.0], [2.0]]), np.array([[0, 7], [7, 2]]), np.array([[0.75, 0.25], [0.5, 0.5]]), scale_by),
            {"output": [[2.75], [11.0]], "calls of experts": "0 2 7"},
        ),
    ),
    calls_of,
)

# choices of one layer (T, K) -> share of tokens that repeat an expert of the previous token
repeat_rate = Check(
    (
        (([[0, 1], [1, 2]],), 1.0),
        (([[0, 1], [2, 3], [3, 2]],), 0.5),
        (([[0, 1], [2, 3], [4, 5], [0, 4], [1, 2]],), 0.25),
    )
)

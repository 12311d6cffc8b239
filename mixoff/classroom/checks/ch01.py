"""Exercises of notebooks/01_router.ipynb."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixoff.classroom.checks.machinery import Check


def not_rescaled(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The choice with the probabilities that a softmax over all experts gives."""
    order = np.argsort(-logits, axis=1)[:, :k]
    p = np.exp(logits - logits.max(1, keepdims=True))
    return order, np.take_along_axis(p / p.sum(1, keepdims=True), order, 1)


# (scores (T, E), experts per token) -> experts, weights, both (T, k)
route = Check(
    (
        ((np.array([[0.0, 2.0, 1.0, -1.0]]), 1), ([[1]], [[1.0]])),
        ((np.log([[1.0, 3.0, 2.0]]), 2), ([[1, 2]], [[0.6, 0.4]])),
        ((np.log([[6.0, 1.0, 3.0], [1.0, 0.5, 4.0]]), 2), ([[0, 2], [2, 0]], [[2 / 3, 1 / 3], [0.8, 0.2]])),
        ((1000 + np.log([[4.0, 1.0]]), 2), ([[0, 1]], [[0.8, 0.2]])),
    ),
    slips={"Rescale: the weights of a token sum to 1.": not_rescaled},
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


def token_by_token(x: np.ndarray, experts: np.ndarray, weights: np.ndarray, expert_fn: Callable) -> np.ndarray:
    """The right output, with a call for each choice."""
    out = np.zeros_like(x)
    for t, k in np.ndindex(experts.shape):
        out[t] += weights[t, k] * expert_fn(experts[t, k], x[t : t + 1])[0]
    return out


def unweighted(x: np.ndarray, experts: np.ndarray, weights: np.ndarray, expert_fn: Callable) -> np.ndarray:
    """A plain sum of the experts' outputs."""
    return moe(x, experts, np.ones_like(weights), expert_fn)


def moe(x: np.ndarray, experts: np.ndarray, weights: np.ndarray, expert_fn: Callable) -> np.ndarray:
    """What is asked for."""
    out = np.zeros_like(x)
    for e in np.unique(experts):
        tokens, place = np.where(experts == e)
        out[tokens] += weights[tokens, place, None] * expert_fn(e, x[tokens])
    return out


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
    slips={
        "The output is right, but an expert is called once per token: collect its rows first.": token_by_token,
        "Multiply each output by its weight.": unweighted,
    },
)


def repeats_over_all(chosen: list) -> float:
    """Repeats over all tokens, the first one included."""
    return sum(bool({*now} & {*before}) for now, before in zip(chosen[1:], chosen, strict=False)) / len(chosen)


# choices of one layer (T, K) -> share of tokens that repeat an expert of the previous token
repeat_rate = Check(
    (
        (([[0, 1], [1, 2]],), 1.0),
        (([[0, 1], [2, 3], [3, 2]],), 0.5),
        (([[0, 1], [2, 3], [4, 5], [0, 4], [1, 2]],), 0.25),
    ),
    slips={"The first token has none before it: divide by T - 1.": repeats_over_all},
)

"""Exercises of notebooks/12_batches_and_balance.ipynb."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixoff.classroom.checks.machinery import Check

# (experts, experts per token, tokens) -> expected number of experts that at least one token asks for
experts_touched = Check(
    (
        ((8, 2, 1), 2.0),
        ((8, 2, 2), 3.5),
        ((8, 2, 16), 8 * (1 - 0.75**16)),
        ((128, 8, 0), 0.0),
        ((4, 4, 9), 4.0),
    ),
    slips={
        "A token's experts differ: it misses one with chance 1 - K/E, not (1 - 1/E) ** K.": lambda E, K, T: (
            E * (1 - (1 - 1 / E) ** (K * T))
        ),
        "Tokens ask for the same experts again: they do not add up.": lambda E, K, T: min(E, K * T),
        "This is the number that nobody asks for.": lambda E, K, T: E * (1 - K / E) ** T,
    },
)


def in_order(by_expert: Callable, experts: list) -> dict:
    """The experts in the order of the answer, and the tokens of each."""
    answer = by_expert(experts)
    if not isinstance(answer, dict):
        return answer
    return {"order": list(answer), **{f"tokens of expert {e}": list(tokens) for e, tokens in answer.items()}}


def grouped(experts: list) -> dict:
    """What `in_order` says of a right answer."""
    wanted = sorted({e for row in experts for e in row})
    return {"order": wanted, **{f"tokens of expert {e}": [t for t, r in enumerate(experts) if e in r] for e in wanted}}


def as_they_come(experts: list) -> dict:
    """The tokens of each expert, experts in the order of their first token."""
    seen = dict.fromkeys(e for row in experts for e in row)
    return {e: [token for token, row in enumerate(experts) if e in row] for e in seen}


ROUTED = ([[0, 1]], [[3, 1], [1, 2], [3, 1]], [[5], [2], [5], [0]], [[7, 6], [6, 7]])

# experts of each token, a list of lists -> dict of the tokens of each expert, experts ascending
by_expert = Check(
    tuple(((rows,), grouped(rows)) for rows in ROUTED),
    in_order,
    slips={
        "These are the experts of each token: turn the table around.": lambda experts: dict(enumerate(experts)),
        "The experts are in the order in which they came up: sort them.": as_they_come,
    },
)


def beyond(experts: np.ndarray, E: int, room: float) -> int:
    """Requests beyond `room` per expert."""
    return int(np.maximum(np.bincount(experts.ravel(), minlength=E) - int(room), 0).sum())


# (experts (T, K), number of experts, capacity factor) -> requests beyond what the experts have room for
dropped = Check(
    (
        ((np.array([[0, 1], [2, 3]]), 4, 1.0), 0),
        ((np.array([[0, 1], [0, 2], [0, 3], [0, 1]]), 4, 1.0), 2),
        ((np.array([[0, 1], [0, 2], [0, 3], [0, 1]]), 4, 1.5), 1),
        ((np.array([[0], [0], [0], [1]]), 8, 2.5), 2),
        ((np.array([[0, 1]] * 8), 8, 1.25), 12),
    ),
    slips={
        "Each token sends K requests: the mean load is T * K / E.": lambda experts, E, factor: beyond(
            experts, E, factor * len(experts) / E
        ),
        "The capacity is rounded down: half a request does not fit.": lambda experts, E, factor: beyond(
            experts, E, -(-factor * experts.size // E)
        ),
    },
)

# (tokens of a prompt, chunk, whether others are decoding) -> passes, in words
chunked = Check(
    (
        ((4, 4, True), ["read 0 to 4"]),
        ((10, 4, True), ["read 0 to 4", "decode", "read 4 to 8", "decode", "read 8 to 10"]),
        ((10, 4, False), ["read 0 to 4", "read 4 to 8", "read 8 to 10"]),
        ((3, 8, True), ["read 0 to 3"]),
        ((6, 2, True), ["read 0 to 2", "decode", "read 2 to 4", "decode", "read 4 to 6"]),
    ),
    slips={
        "The others wait for the whole prompt: they get a token between two chunks.": lambda prompt, chunk, running: [
            f"read {at} to {min(at + chunk, prompt)}" for at in range(0, prompt, chunk)
        ],
        "The last chunk ends where the prompt ends.": lambda prompt, chunk, running: [
            piece
            for at in range(0, prompt, chunk)
            for piece in ["decode"] * (running and at > 0) + [f"read {at} to {at + chunk}"]
        ],
    },
)

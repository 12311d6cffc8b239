"""Exercises of notebooks/13_fewer_experts.ipynb."""

from collections.abc import Callable

import numpy as np

from mixoff.classroom.checks.machinery import Check

# (weights (T, K), descending and with sum 1; mass) -> how many experts each token keeps
dynamic_top_k = Check(
    (
        ((np.array([[0.75, 0.25]]), 0.75), [1]),
        ((np.array([[0.75, 0.25], [0.5, 0.5]]), 0.9), [2, 2]),
        ((np.array([[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]]), 0.75), [2, 1]),
        ((np.array([[0.5, 0.5], [0.75, 0.25]]), 0.0), [1, 1]),
        ((np.array([[0.5, 0.25, 0.25]]), 1.0), [3]),
    ),
    slips={
        "The mass of an expert counts itself here: ask what the heavier ones before it make up.": (
            lambda weights, mass: (weights.cumsum(1) < mass).sum(1)
        )
    },
)

# (weights (K,); which experts are resident; how many of the heaviest are always waited for) -> new weights (K,)
skip_misses = Check(
    (
        ((np.array([0.75, 0.25]), np.array([True, True]), 1), [0.75, 0.25]),
        ((np.array([0.75, 0.25]), np.array([True, False]), 1), [1.0, 0.0]),
        ((np.array([0.75, 0.25]), np.array([False, True]), 1), [0.75, 0.25]),
        ((np.array([0.25, 0.75]), np.array([False, False]), 1), [0.0, 1.0]),
        ((np.array([0.5, 0.25, 0.25]), np.array([False, True, False]), 1), [2 / 3, 1 / 3, 0.0]),
        ((np.array([0.5, 0.25, 0.25]), np.array([False, False, False]), 2), [2 / 3, 1 / 3, 0.0]),
        ((np.array([0.75, 0.25]), np.array([False, False]), 0), [0.0, 0.0]),
    ),
    slips={
        "The weights that stay must have the old sum: divide by what is left.": (
            lambda weights, resident, keep: weights * (resident | (np.argsort(np.argsort(-weights)) < keep))
        )
    },
)


def _ask_greedy(fn: Callable, losses: dict[str, float], experts: list[int], keep: int) -> list[int]:
    """Calls the learner's function with a loss that it can ask for any set of experts that are gone."""

    def loss_without(gone: object) -> float:
        key = "".join(map(str, sorted(gone)))  # type: ignore[call-overload]  # any set of ints
        return losses[key]

    return sorted(fn(loss_without, list(experts), keep))


# two experts that can each replace the other: alone, each can go; together, they cannot
_TWINS = {"": 2.0, "0": 2.01, "1": 2.02, "2": 2.3, "3": 2.4, "01": 3.9, "02": 2.35, "03": 2.45}
_TWINS |= {"12": 2.5, "13": 2.6, "23": 2.9, "012": 5.0, "013": 5.0, "023": 2.8, "123": 3.0}

# (loss by what is gone; experts; how many stay) -> the experts that stay
greedy = Check(
    (
        ((_TWINS, [0, 1, 2, 3], 4), [0, 1, 2, 3]),
        ((_TWINS, [0, 1, 2, 3], 3), [1, 2, 3]),
        ((_TWINS, [0, 1, 2, 3], 2), [1, 3]),
        ((_TWINS, [0, 1, 2, 3], 1), [1]),
    ),
    ask=_ask_greedy,
    slips={
        "The losses of the first round decide here: once 0 has gone, 1 matters.": (
            lambda loss_without, experts, keep: sorted(experts, key=lambda e: loss_without({e}))[len(experts) - keep :]
        )
    },
)


def _softmax(rows: list) -> np.ndarray:
    e = np.exp(np.asarray(rows, float))
    return e / e.sum(-1, keepdims=True)


def _kl(teacher: list, student: list) -> float:
    p, q = _softmax(teacher), _softmax(student)
    return float((p * np.log(p / q)).sum(-1).mean())


_LOGITS = [[0.0, 1.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]
_HIGH = [[1000.0, 1001.0]], [[1000.0, 1000.0]]

# (logits of the teacher (T, V); of the student (T, V)) -> KL from the teacher's predictions, nats per token
distil_loss = Check(
    (
        ((np.array(_LOGITS[0]), np.array(_LOGITS[0])), 0.0),
        ((np.array([[0.0, 0.0]]), np.array([[0.0, np.log(3.0)]])), _kl([[0, 0]], [[0, np.log(3.0)]])),
        ((np.array(_LOGITS[0]), np.array(_LOGITS[1])), _kl(*_LOGITS)),
        ((np.array(_HIGH[0]), np.array(_HIGH[1])), _kl([[0, 1]], [[0, 0]])),
    ),
    slips={
        "This is the divergence the other way round: weigh with the teacher's probabilities.": (
            lambda teacher, student: _kl(student - student.max(), teacher - teacher.max())
        )
    },
)

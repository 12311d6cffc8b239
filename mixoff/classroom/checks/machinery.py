"""How a check runs a learner's function on its cases, and what it says about the first wrong answer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

REL_TOL = 1e-6  # answers are sums and quotients of a few exact numbers, so double precision is ample
SHOWN = 60  # characters of a wrong answer
UNLIKE = object()  # equal to no answer


@dataclass(frozen=True)
class Check:
    """The cases of one exercise.

    cases: pairs of arguments and expected answer.
    ask: function `ask(fn, *arguments)` that returns the answer of the learner's `fn`; by default it calls `fn`.
    slips: typical mistakes, a sentence and a function that makes the mistake.
    """

    cases: tuple[tuple[tuple, object], ...]
    ask: Callable = lambda fn, *arguments: fn(*arguments)
    slips: Mapping[str, Callable] = field(default_factory=dict)

    def __call__(self, fn: Callable) -> None:
        """Print the verdict on `fn`."""
        print(self.verdict(fn))

    def mine(self, fn: Callable, solution: Callable) -> Callable:
        """The learner's `fn` if it passes, else `solution`, whose verdict is printed; figures below use what returns.

        Where `fn` raises on other arguments than those of the cases, the solution answers in its place.
        """
        print(self.verdict(solution))
        if not self.verdict(fn).startswith("[ ok ]"):
            return solution
        print(f"from here on your {getattr(fn, '__name__', 'function')} is used")

        @functools.wraps(fn)
        def guarded(*arguments: object, **named: object) -> object:
            try:
                return fn(*arguments, **named)
            except Exception:
                return solution(*arguments, **named)

        return guarded

    def verdict(self, fn: Callable) -> str:
        """What is to say about `fn`; stops at the first wrong case and shows its call and both answers."""
        if not callable(fn):
            return f"[FAIL] pass the function itself, not {describe(fn)}"
        name = getattr(fn, "__name__", "")
        for n, (arguments, expected) in enumerate(self.cases, start=1):
            given, answer = copy.deepcopy(arguments), UNLIKE
            try:
                answer = self.ask(fn, *given)
                complaint = difference(answer, expected)
                if not complaint and repr(given) != repr(arguments):
                    complaint = "right, but the call changed its arguments"
            except NotImplementedError:
                return "[ .. ] not attempted yet"
            except Exception as error:  # whatever the learner's code raises is a wrong answer
                complaint = f"raised {type(error).__name__}: {error}"
            if complaint:
                call = f"{name}({', '.join(map(argument, arguments))})"
                said = [("call", call), ("returned", answer), ("expected", expected)]
                shown = [f"       {word:<9}{argument(x)}" for word, x in said if x is not UNLIKE]
                return "\n".join([f"[FAIL] case {n}: {complaint}", *shown, *self.slip(fn)])
        return f"[ ok ] {'solution, ' * name.endswith('_solution')}{len(self.cases)} cases"

    def slip(self, fn: Callable) -> list[str]:
        """The typical mistake that answers every case as `fn` does, as an indented line; none if there is none."""
        return [f"       {sentence}" for sentence, mistake in self.slips.items() if self.agree(fn, mistake)][:1]

    def agree(self, fn: Callable, mistake: Callable) -> bool:
        """Whether both functions give the same answer in every case, without raising."""
        try:
            pairs = ([self.ask(f, *copy.deepcopy(case)) for f in (fn, mistake)] for case, _ in self.cases)
            return all(difference(one, other) is None for one, other in pairs)
        except Exception:
            return False


def argument(value: object) -> str:
    """A value as it is written in a call: text as it is, functions by name, arrays on one line."""
    if isinstance(value, str):
        return value
    if callable(value):
        return getattr(value, "__name__", describe(value))
    return describe(value.tolist() if isinstance(value, np.ndarray) else value, shown=3 * SHOWN)


def describe(value: object, shown: int = SHOWN) -> str:
    """The repr of a value, cut to `shown` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= shown else text[: shown - 1] + "…"


def difference(answer: object, expected: object) -> str | None:
    """What is wrong with an answer, in words; None if it is right.

    >>> difference([1, 2], [1, 3])
    'position 1 is 2, expected 3'
    >>> difference(0.1 + 0.2, 0.3) is None
    True
    """
    if expected is None:
        return None if answer is None else f"{describe(answer)}, expected None"
    if answer is None:
        return f"returned nothing, expected {describe(expected)}"
    if isinstance(expected, (str, bool, set)):
        return None if answer == expected else f"{describe(answer)}, expected {describe(expected)}"
    if isinstance(expected, dict):
        return dict_difference(answer, expected)
    if isinstance(expected, list) and any(isinstance(x, str) for x in expected):
        return words_difference(answer, expected)
    if isinstance(expected, tuple):
        return tuple_difference(answer, expected)
    return array_difference(np.asarray(answer), np.asarray(expected))


def tuple_difference(answer: object, expected: tuple) -> str | None:
    """`difference` for several answers, named first, second and third."""
    if not isinstance(answer, (tuple, list)) or len(answer) != len(expected):
        return f"{describe(answer)}, expected {len(expected)} things"
    for name, one, want in zip(("first", "second", "third"), answer, expected, strict=False):
        if complaint := difference(one, want):
            return f"{name} answer: {complaint}"
    return None


def dict_difference(answer: object, expected: dict) -> str | None:
    """`difference` for answers with names: the first name whose answer is wrong."""
    if not isinstance(answer, dict) or answer.keys() != expected.keys():
        return f"{describe(answer)}, expected {describe(expected)}"
    complaints = ((name, difference(answer[name], want)) for name, want in expected.items())
    return next((f"{name}: {complaint}" for name, complaint in complaints if complaint), None)


def words_difference(answer: object, expected: list) -> str | None:
    """`difference` for lists of words: the first position where they differ.

    >>> words_difference(["fetch 3"], ["fetch 3", "compute 3"])
    'position 1 is nothing, expected compute 3'
    """
    if not isinstance(answer, (list, tuple)):
        return f"{describe(answer)}, expected {describe(expected)}"
    pairs = enumerate(zip_longest(answer, expected, fillvalue="nothing"))
    return next((f"position {n} is {one}, expected {want}" for n, (one, want) in pairs if one != want), None)


def array_difference(answer: np.ndarray, expected: np.ndarray) -> str | None:
    """`difference` for numbers, lists of numbers and arrays: the shape, then the first value that differs."""
    if answer.shape != expected.shape:
        return f"shape {answer.shape}, expected {expected.shape}"
    if not np.issubdtype(answer.dtype, np.number):
        return f"{describe(answer.tolist())} is not a number, expected {describe(expected.tolist())}"
    wrong = np.argwhere(~np.isclose(answer, expected, rtol=REL_TOL, atol=0, equal_nan=True))
    if not len(wrong):
        return None
    where = tuple(int(i) for i in wrong[0])
    have, want = answer[where].item(), expected[where].item()
    if not where:
        return f"{have}, expected {want}"
    return f"position {where[0] if len(where) == 1 else where} is {have}, expected {want}"

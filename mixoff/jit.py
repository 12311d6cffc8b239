"""Loops compiled by numba, kept on disk where there is a folder for it. Knows nothing of what they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numba.core.ccallback import CFunc


def jit(loop: Callable, error_model: str = "python") -> Callable:
    """`loop` compiled; it holds no lock. error_model: `"numpy"` divides by zero as NumPy does, without a branch.

    Raises ImportError where numba is not installed.
    """
    import numba

    return _kept(functools.partial(numba.njit, nogil=True, error_model=error_model), loop)


def function(loop: Callable, error_model: str = "python") -> CFunc:
    """`loop`, of three numbers that it takes as int64, compiled as a function that has an address.

    Whoever calls it there holds no lock and hears of no error. Raises ImportError where numba is not installed.
    """
    import numba

    return _kept(functools.partial(numba.cfunc, "void(int64, int64, int64)", error_model=error_model), loop)


def _kept(compiler: Callable, loop: Callable) -> Callable:
    try:
        return compiler(cache=True)(loop)
    except RuntimeError:  # no folder in which to keep compiled code
        return compiler()(loop)


# --- loops, compiled by numba where that pays ------------------------------------------------------------------------

COMPILE_FROM = 20_000  # requests, two seconds in Python; numba starts in one once it has compiled, which takes ten


def compiled(loop: Callable, requests: int = COMPILE_FROM, helpers: tuple[Callable, ...] = ()) -> Callable:
    """`loop`, or its compiled twin with equal results when there are many requests and numba is installed."""
    return loop if requests < COMPILE_FROM else _compile(loop, helpers)


@functools.cache
def _compile(loop: Callable, helpers: tuple[Callable, ...]) -> Callable:
    try:
        import numba
    except ImportError:
        return loop
    for helper in helpers:
        numba.extending.register_jitable(helper)
    return jit(loop)

"""Loops compiled by numba, cached on disk where there is a folder for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numba.core.ccallback import CFunc


def jit(loop: Callable, error_model: str = "python") -> Callable:
    """`loop` compiled, to run without the GIL. Raises ImportError where numba is not installed.

    error_model: `"numpy"` divides by zero as NumPy does, without a branch.
    """
    import numba

    return _kept(functools.partial(numba.njit, nogil=True, error_model=error_model), loop)


def function(loop: Callable, error_model: str = "python") -> CFunc:
    """`loop`, a function of three int64, compiled as a C function. Raises ImportError where numba is not installed.

    It is called by its address, so the GIL is not held and exceptions are lost.
    """
    import numba

    return _kept(functools.partial(numba.cfunc, "void(int64, int64, int64)", error_model=error_model), loop)


def _kept(compiler: Callable, loop: Callable) -> Callable:
    try:
        return compiler(cache=True)(loop)
    except RuntimeError:  # no folder in which to keep compiled code
        return compiler()(loop)


# --- loops, compiled by numba where that pays ------------------------------------------------------------------------

COMPILE_FROM = 20_000  # requests: two seconds in Python; numba takes ten to compile once, then one to start


def compiled(loop: Callable, requests: int = COMPILE_FROM, helpers: tuple[Callable, ...] = ()) -> Callable:
    """`loop` itself, or compiled, with equal results, if there are many requests and numba is installed."""
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

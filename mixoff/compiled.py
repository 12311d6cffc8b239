"""Loops compiled by numba, kept on disk where there is a folder for it. Knows nothing of what they compute."""

from __future__ import annotations

from collections.abc import Callable


def jit(loop: Callable, error_model: str = "python") -> Callable:
    """`loop` compiled; it holds no lock. error_model: `"numpy"` divides by zero as NumPy does, without a branch.

    Raises ImportError where numba is not installed.
    """
    import numba

    try:
        return numba.njit(nogil=True, cache=True, error_model=error_model)(loop)
    except RuntimeError:  # no folder in which to keep compiled code
        return numba.njit(nogil=True, error_model=error_model)(loop)

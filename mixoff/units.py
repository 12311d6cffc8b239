"""Bytes as people write them, and back. Built in notebooks/00."""

from __future__ import annotations

import math
import re

from mixoff.errors import BudgetError

UNITS = {"": 1, "B": 1}
UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)} | {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}
UNITS |= {p: 1024**i for i, p in enumerate("KMGT", 1)}  # a bare letter, as the kernel, dd and docker read it
PAGE = 4096  # bytes: offsets, sizes and addresses in direct I/O are multiples of it
MOST = 2**63  # bytes: nothing is larger
SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_nbytes(size: int | float | str) -> int:
    """Bytes in `size`: a number, or text with a unit (`MB` is decimal, `MiB` and a bare `M` are binary).

    Raises BudgetError for a negative, infinite, absurd or unreadable size.

    >>> parse_nbytes("6MB"), parse_nbytes("1.5 GiB"), parse_nbytes(4096)
    (6000000, 1610612736, 4096)
    """
    if isinstance(size, str):
        match = SIZE.fullmatch(size)
        nbytes = float(match[1]) * UNITS.get(match[2].upper(), math.inf) if match else math.inf
        if not nbytes < MOST:
            raise BudgetError(
                f"cannot read {size[:40]!r} as a size: write a positive number with a unit, as in 500MB or 6GiB"
            )
        return int(nbytes)
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 <= size < MOST:
        raise BudgetError(f"cannot use {size!r} as a size: give a positive number of bytes, or text as in '6GiB'")
    return int(size)


def format_nbytes(nbytes: int | float) -> str:
    """`nbytes` with a binary unit and three significant digits.

    >>> format_nbytes(6_000_000), format_nbytes(221184), format_nbytes(12)
    ('5.72 MiB', '216 KiB', '12 B')
    """
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    if unit == "B" or abs(value) >= 100:
        digits = 0
    elif abs(value) >= 10:
        digits = 1
    else:
        digits = 2
    return f"{value:.{digits}f} {unit}"


GB, GIB, MIB = 10**9, 2**30, 2**20

"""Which chapters whole runs take: Colab's emulation and the browser need a minute for each."""

import pytest

ALWAYS = ("00", "02", "09", "15")  # the first and the last, and those whose widgets ask the kernel


def is_always_run(path):
    """Whether a chapter is one of ALWAYS. The others run with slow tests (`go.py test --all`); nbval runs all."""
    return path.name[:2] in ALWAYS


def often(chapters):
    """Parameters: a chapter each."""
    return [pytest.param(p, id=p.stem, marks=[] if is_always_run(p) else [pytest.mark.slow]) for p in chapters]


def together(chapters):
    """Parameters: the chapters that are always run in one list, then each of the others in a list of its own."""
    always = [path for path in chapters if is_always_run(path)]
    others = [path for path in chapters if not is_always_run(path)]
    return [pytest.param(always, id="always"), *(pytest.param([p], id=p.stem, marks=pytest.mark.slow) for p in others)]

"""What the table scripts share: Markdown, medians by turns, marked parts of a page, and figures on one line."""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def parser(doc: str) -> argparse.ArgumentParser:
    """A command line whose `--help` is the script's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def line(cells: Iterable[object]) -> str:
    """A row of a Markdown table.

    >>> line(["a", 1])
    '| a | 1 |'
    """
    return f"| {' | '.join(map(str, cells))} |"


def head(*names: str) -> str:
    """The first two lines of a table."""
    return f"{line(names)}\n|{'---|' * len(names)}"


def table(names: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A whole table."""
    return "\n".join([head(*names), *map(line, rows)])


def best(seconds: Callable[[int], float], runs: int, warm_up: int = 1) -> float:
    """The fastest of `runs` calls after those of the warm-up; `seconds` gets the number of the call."""
    return min([seconds(i) for i in range(warm_up + runs)][warm_up:])


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replaces what is between two marks of a page."""
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        sys.exit(f"{page} lacks the marks {begin.strip()} and {end.strip()}")
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{after}", encoding="utf-8")


def use_svg() -> None:
    """Settings for figures that are the same bytes on each run."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "mixoff", "font.size": 9, "svg.fonttype": "none"})


def save_svg(fig: object, path: str | Path) -> None:
    """Writes a figure on one line: a new figure is one changed line of a diff."""
    drawn = io.StringIO()
    fig.savefig(drawn, format="svg", metadata={"Date": None})
    Path(path).write_text(one_line(drawn.getvalue()), encoding="utf-8")


def one_line(svg: str) -> str:
    """The same drawing without line breaks.

    >>> one_line('<g>\\n <path d="M 1 1\\nL 2 2"/>\\n</g>\\n')
    '<g><path d="M 1 1 L 2 2"/></g>\\n'
    """
    return re.sub(r"\s*\n\s*", " ", re.sub(r">\s*\n\s*<", "><", svg)).strip() + "\n"

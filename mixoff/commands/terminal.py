"""What commands print next to their result: a line while they start, and messages on standard error."""

from __future__ import annotations

import shutil
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from mixoff.errors import MixoffError, printable

EVERY_S = 10.0  # seconds between lines of progress


@contextmanager
def starting(activity: str) -> Iterator[None]:
    """In a terminal, show `activity` at once, while libraries are imported and files opened."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{printable(activity)} ...", end="", file=sys.stderr, flush=True)
    try:
        quiet_transformers()
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def ticking(status: Callable[[], str | None], every_s: float = EVERY_S) -> Iterator[None]:
    """Print what `status` returns every so many seconds, unless it is None or the same as before."""
    ended = threading.Event()

    def tick() -> None:
        last = None
        while not ended.wait(every_s):
            if (line := status()) not in (None, last):
                say(str(line))
                last = line

    threading.Thread(target=tick, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def fold(text: str, stream: TextIO, indent: int = 0) -> str:
    """`text` broken between words at the width of the terminal that `stream` is; in a file, lines stay whole.

    indent: columns before each further line of a line that was broken
    """
    if not stream.isatty():
        return text
    width = max(shutil.get_terminal_size().columns - 1, indent + 20)
    wrap = textwrap.TextWrapper(width, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
    return "\n".join("\n".join(wrap.wrap(line)) for line in text.split("\n"))


def quiet_transformers() -> None:
    """Import transformers, and turn off its progress bars and warnings."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def confirmed(question: str, way_out: str) -> bool:
    """Whether a person at the terminal says yes. Raises MixoffError without a terminal, naming the way out."""
    if not sys.stdin.isatty():
        raise MixoffError(f"nobody is here to answer the question {question!r}: {way_out}")
    print(f"{printable(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def say(line: str) -> None:
    """Print a message to standard error."""
    print(f"mixoff: {line}", file=sys.stderr, flush=True)

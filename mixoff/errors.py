"""The errors a user can cause, each a sentence that names the cause and the way out.

The command line turns every `MixoffError` into that one line and exit code 2; anything else is a bug of ours.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

LONGEST = 2000  # characters of an error in a terminal: a file may put any number of them into one


class MixoffError(ValueError):
    """Base of all errors that are about what was asked for rather than about mixoff."""


class CheckpointError(MixoffError):
    """A model folder that is missing, damaged, unsafe or not a Mixture-of-Experts checkpoint."""


class BudgetError(MixoffError):
    """A memory budget that is malformed or too small to run at all."""


def one_line(text: object) -> str:
    r"""`text` on one line of at most LONGEST characters, with nothing in it that a terminal would obey.

    >>> print(one_line("red:\x1b[31m\nend"))
    red:\x1b[31m end
    """
    words = " ".join(str(text)[: 4 * LONGEST].split())
    return printable(words if len(words) <= LONGEST else words[:LONGEST] + " ...")


def printable(text: str, kept: str = "") -> str:
    r"""`text` with control characters, all but those `kept`, and lone surrogates written out, as in \x1b.

    Characters that turn the direction of writing count as well: with them, a name can look like another.
    """
    return "".join(c if c in kept or not _acts(c) else ascii(c)[1:-1] for c in text)


def _acts(character: str) -> bool:
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return True
    return unicodedata.bidirectional(character) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")


def suggestion(word: str, known: Iterable[str]) -> str:
    """What to add to an error about `word`, where one of the `known` words is much like it.

    >>> suggestion("lur", ("lru", "lfu")), suggestion("elephant", ("lru", "lfu"))
    ("; did you mean 'lru'?", '')
    """
    plain = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower()[:100], plain, 1)
    return f"; did you mean {plain[near[0]]!r}?" if near else ""

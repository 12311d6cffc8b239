"""The errors that a user can cause, each a sentence that names the cause and the way out.

The command line turns every `MixoffError` into that one line and exit code 2; anything else is a bug of ours.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

LONGEST = 2000  # characters of an error in a terminal; text from a file can be any length
AGAIN = "run the same command again, and it goes on where it stopped"  # way out of what can be resumed


class MixoffError(ValueError):
    """Base of all errors about a request rather than about mixoff itself."""


class CheckpointError(MixoffError):
    """A model folder that is missing, damaged, unsafe or not a Mixture-of-Experts checkpoint."""


class BudgetError(MixoffError):
    """A memory budget that is malformed or too small to run at all."""


def one_line(text: object) -> str:
    r"""`text` on one line of at most LONGEST characters, without control characters that a terminal would obey.

    >>> print(one_line("red:\x1b[31m\nend"))
    red:\x1b[31m end
    """
    words = " ".join(str(text)[: 4 * LONGEST].split())
    return printable(words if len(words) <= LONGEST else words[:LONGEST] + " ...")


def printable(text: str, kept: str = "") -> str:
    r"""`text` with control characters and lone surrogates escaped, as in \x1b, except those in `kept`.

    Characters that change the direction of writing are escaped too: they can make one name look like another.
    """
    return "".join(c if c in kept or not _acts(c) else ascii(c)[1:-1] for c in text)


def _acts(character: str) -> bool:
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return True
    return unicodedata.bidirectional(character) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")


def suggestion(word: str, known: Iterable[str]) -> str:
    """A hint to append to an error about `word` if it resembles one of the `known` words.

    >>> suggestion("lur", ("lru", "lfu")), suggestion("elephant", ("lru", "lfu"))
    ("; did you mean 'lru'?", '')
    """
    plain = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(str(word).lower()[:100], plain, 1)
    return f"; did you mean {plain[matches[0]]!r}?" if matches else ""

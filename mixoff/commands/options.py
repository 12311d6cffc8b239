"""Options that several commands share: each function adds the option of its name.

add: the `add_argument` of a command's parser.
"""

from __future__ import annotations

from collections.abc import Callable

from mixoff.commands import arguments

PATH = "folder of a store or checkpoint, bundled model, or Hub id"
SCHEMES = f"{', '.join(arguments.SCHEMES[:-1])} or {arguments.SCHEMES[-1]}"


def max_new_tokens(add: Callable, default: int) -> None:
    """`--max-new-tokens`, at least 1."""
    kind = arguments.whole("max_new_tokens", "ask for at least one token")
    add("--max-new-tokens", type=kind, default=default, metavar="N", help="largest number of tokens to generate")


def fast_bytes(add: Callable, default: str = "auto") -> None:
    """`--fast-bytes`: a size with or without a unit, or `auto`."""
    text = "bytes of experts in the fast tier, as in 500MB or 6GiB; auto: 6GiB, or the free memory of a GPU"
    add("--fast-bytes", type=arguments.size_or_auto, default=default, metavar="SIZE", help=text)


def scheme(add: Callable, text: str, default: str | None = None) -> None:
    """`--scheme`, a preset; SCHEMES in `text` is replaced by their names."""
    kind = arguments.choice("scheme", arguments.SCHEMES)
    add("--scheme", type=kind, default=default, help=text.replace("SCHEMES", SCHEMES))


def prefetch(add: Callable, text: str = "") -> None:
    """`--prefetch`; `text` continues its help."""
    kind = arguments.choice("prefetch", arguments.PREFETCH)
    add("--prefetch", type=kind, default="auto", help=f"guesses of the next experts: auto, none or next-router{text}")


def io(add: Callable) -> None:
    """`--io`: how experts are read from disk."""
    kind = arguments.choice("io", arguments.IO)
    add("--io", type=kind, default="auto", help="reads: auto, direct (past the page cache) or buffered")


def threads(add: Callable, text: str, default: int | None = None, name: str = "threads") -> None:
    """`--threads`, or another `name` for it."""
    kind = arguments.whole(name, "give at least one thread, of at most 1024", 1, 1024)
    add(f"--{name}", type=kind, default=default, metavar="N", help=text)


def seed(add: Callable, default: int = 0) -> None:
    """`--seed`, any 64-bit number, signed or unsigned."""
    kind = arguments.whole("seed", "give a whole number of at most 64 bits", -(2**63), 2**64 - 1)
    add("--seed", type=kind, default=default, metavar="N", help="random seed for sampling")

"""`mixoff prune`: write a store with fewer experts per layer."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from mixoff.commands import arguments, terminal
from mixoff.store.inventory import nbytes_of

HELP = "write a store with fewer experts per layer: lossy"
BY = ("loss", "counts")


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("source", metavar="STORE", help="folder of the store")
    add("target", metavar="OUT", help="folder to create; must not exist")
    few = "give the number of experts per layer that stay"
    add("--keep", type=arguments.whole("keep", few), required=True, metavar="N", help="experts per layer that stay")
    text = "drop what raises the loss of a text least (loss), or what it chooses least often (counts)"
    add("--by", type=arguments.choice("way to choose", BY), default="loss", metavar="WAY", help=text)
    add("--merge", action="store_true", help="average what is dropped into the most similar expert that stays")
    add("--text", default="default", metavar="FILE", help="text to choose by (default the bundled one)")
    tokens = arguments.whole("tokens", "give the number of tokens of the text to read, 256 or more", least=256)
    add("--tokens", type=tokens, default=5120, metavar="N", help="how much of the text is read")


def main(args: argparse.Namespace) -> int:
    """Prune, and print the size and what it took."""
    arguments.new_folder(args.target)
    arguments.model(args.source)
    if args.text != "default":
        arguments.text_of(args.text)
    with terminal.starting(f"pruning {args.source}"):
        from mixoff.pruning.prune import prune
        from mixoff.units import format_nbytes

    start = time.perf_counter()
    target = prune(
        args.source, args.target, args.keep, args.by, merge=args.merge, text=args.text, tokens=args.tokens,
        progress=False if args.json else None,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    before, after = nbytes_of(Path(args.source)), nbytes_of(target)
    if args.json:
        report = {"target": str(target), "nbytes": after, "source_nbytes": before, "seconds": seconds}
        print(json.dumps(report))
        return 0
    print(f"wrote {target}: {format_nbytes(after)} in place of {format_nbytes(before)}, in {seconds:.1f} s")
    print("pruning is lossy: compare both on your own text, as in notebooks/13_fewer_experts")
    return 0

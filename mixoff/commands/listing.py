"""`mixoff list`: the models on this machine, with their sizes."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from mixoff.commands import terminal
from mixoff.errors import printable
from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from mixoff.store.inventory import Entry

HELP = "models on this machine, with sizes: stores, kept conversions, the Hub's cache"
KINDS = {
    "bundled": "Bundled with mixoff",
    "kept": "Kept conversions, made for --scheme",
    "gguf": "Configuration and tokenizer of GGUF files",
    "store": "Stores in folders",
    "unfinished": "Conversions that did not end",
    "hub": "Mixture-of-Experts models in the Hub's cache",
}


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    text = "folder to look into for stores (default the current one)"
    parser.add_argument("folders", nargs="*", default=["."], metavar="FOLDER", help=text)


def main(args: argparse.Namespace) -> int:
    """Print the list."""
    from mixoff.store import inventory

    listed = inventory.entries(args.folders)
    if args.json:
        print(json.dumps({"models": [entry.to_dict() for entry in listed], "nbytes": sum(e.nbytes for e in listed)}))
        return 0
    print(terminal.fold("\n".join(_lines(listed)), sys.stdout, indent=13))
    return 0


def _lines(listed: list[Entry]) -> list[str]:
    """One line per model below a heading per kind, and the sum."""
    lines = []
    for kind, heading in KINDS.items():
        of_kind = [entry for entry in listed if entry.kind == kind]
        lines += [heading] if of_kind else []
        lines += [f"  {format_nbytes(entry.nbytes):>9}  {_name(entry)}" for entry in of_kind]
    return [*lines, f"  {format_nbytes(sum(e.nbytes for e in listed)):>9}  in all; `mixoff rm NAME` removes one"]


def _name(entry: Entry) -> str:
    bits = f" (experts in {entry.bits} bits)" if entry.bits else ""
    return f"{printable(entry.name)}{bits}"

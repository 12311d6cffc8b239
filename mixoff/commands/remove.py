"""`mixoff rm`: delete stores, kept conversions, and models in the Hub's cache."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from mixoff.commands import terminal
from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from mixoff.store.inventory import Entry

HELP = "delete models that `mixoff list` names"


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    text = "name in `mixoff list`, or the last part of its path"
    parser.add_argument("names", nargs="+", metavar="NAME", help=text)
    parser.add_argument("--yes", action="store_true", help="delete without asking")


def main(args: argparse.Namespace) -> int:
    """Ask, and delete. Every name is looked up before anything is deleted."""
    from mixoff.store import inventory

    places = [".", *(name for name in args.names if os.path.isdir(name))]
    listed = inventory.entries(places)
    chosen = list(dict.fromkeys(inventory.find(name, listed) for name in args.names))
    removed = [entry for entry in chosen if args.yes or _confirmed(entry)]
    for entry in removed:
        inventory.remove(entry)
    nbytes = sum(entry.nbytes for entry in removed)
    if args.json:
        print(json.dumps({"removed": [entry.to_dict() for entry in removed], "nbytes": nbytes}))
    else:
        print(f"removed {', '.join(entry.name for entry in removed) or 'nothing'}: {format_nbytes(nbytes)}")
    return 0


def _confirmed(entry: Entry) -> bool:
    return terminal.confirmed(f"delete {entry.name} ({format_nbytes(entry.nbytes)})?", "pass --yes")

"""`mixoff rm`: delete stores, kept conversions, and models in the Hub's cache."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
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

    places = [".", *(name for name in args.names if Path(name).is_dir())]
    listed = inventory.entries(places)
    chosen = list(dict.fromkeys(inventory.find(name, listed) for name in args.names))
    removed = [entry for entry in chosen if args.yes or _confirmed(entry)]
    for entry in removed:
        inventory.remove(entry)
    report = {"removed": [entry.to_dict() for entry in removed], "nbytes": sum(entry.nbytes for entry in removed)}
    names = ", ".join(entry.name for entry in removed) or "nothing"
    print(json.dumps(report) if args.json else f"removed {names}: {format_nbytes(report['nbytes'])}")
    return 0


def _confirmed(entry: Entry) -> bool:
    return terminal.confirmed(f"delete {entry.name} ({format_nbytes(entry.nbytes)})?", "pass --yes")

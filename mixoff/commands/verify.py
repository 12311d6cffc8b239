"""`mixoff verify`: exit code 0 for a sound store, 1 for a damaged one, 2 for a folder that is not a store."""

from __future__ import annotations

import argparse
import json
import sys

from mixoff.commands import arguments, terminal
from mixoff.errors import CheckpointError

HELP = "check a store: files and sizes, or every byte"


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("path", metavar="STORE", help="folder of the store")
    parser.add_argument("--full", action="store_true", help="check the SHA-256 of every tensor too")


def main(args: argparse.Namespace) -> int:
    """Check a store, and print what was checked."""
    arguments.model(args.path)
    terminal.quiet_transformers()
    from mixoff.checkpoints.find import find
    from mixoff.store import verify
    from mixoff.units import format_nbytes

    if not find(args.path).is_store:
        raise CheckpointError(f"{args.path} is not a mixoff store: create one with `mixoff convert`")
    try:
        report = {"ok": True} | verify.verify(args.path, args.full)
    except CheckpointError as error:
        report = {"ok": False, "error": str(error)}
    if args.json:
        print(json.dumps(report))
    elif report["ok"]:
        checked = "every byte" if args.full else "files and sizes"
        print(f"{checked} as written: {report['tensors']} tensors, {format_nbytes(report['nbytes'])}")
    else:
        print(f"mixoff: {report['error']}", file=sys.stderr)
    return 0 if report["ok"] else 1

"""`mixoff doctor`: what is installed, what this machine can do, and what will work."""

from __future__ import annotations

import argparse

from mixoff.commands import terminal

HELP = "versions, memory, bandwidths, and what will work here"


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--refresh", action="store_true", help="measure bandwidths again")


def main(args: argparse.Namespace) -> int:
    """Examine this machine, and print the findings."""
    with terminal.starting("measuring this machine"):
        from mixoff.bench import doctor

        checkup = doctor.examine(cached=not args.refresh)
    print(checkup.to_json() if args.json else checkup)
    return 0

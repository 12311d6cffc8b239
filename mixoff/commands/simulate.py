"""`mixoff simulate`: replay a trace through a cache."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mixoff.commands import arguments

HELP = "count the hits and misses of a trace under a cache policy"


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("trace", metavar="TRACE", help="file of `mixoff trace`, .csv or .jsonl, or bundled: tiny-mixtral/novel")
    names = "lru, fifo, lfu, lfuda, lfru, random, least-stale, half-life, static, belady, or all for a table"
    add("--policy", type=arguments.simulated_policy, default="lru", help=names)
    slots = arguments.whole("slots", "give a whole number, of each layer")
    add("--slots", type=slots, default=4, metavar="S", help="slots per layer")
    scope = parser.add_mutually_exclusive_group()
    flag: dict[str, Any] = {"dest": "scope", "action": "store_const"}
    scope.add_argument("--per-layer", **flag, const="layer", help="one pool per layer (default)")
    scope.add_argument("--global", **flag, const="global", help="one pool of slots x layers")
    add("--expert-nbytes", metavar="SIZE", help="size of one expert, for bytes_moved: 221184, 52MiB")
    text = "none, next-router (recorded in the trace), popularity, oracle, or recall=0.86"
    add("--prefetch", default="none", help=text)
    add("--prefetch-nbytes", metavar="SIZE", help="most bytes to prefetch per layer (default top-k experts)")
    parser.set_defaults(scope="layer")


def main(args: argparse.Namespace) -> int:
    """Replay the trace, and print the counts."""
    from mixoff.trace import simulate
    from mixoff.trace.trace import Trace
    from mixoff.units import parse_nbytes

    nbytes, ahead = (x if x is None else parse_nbytes(x) for x in (args.expert_nbytes, args.prefetch_nbytes))
    trace, guesses = Trace.load(args.trace), {"prefetch": args.prefetch, "prefetch_nbytes": ahead}
    if args.policy == "all":
        table = simulate.compare(trace, args.slots, args.scope, nbytes, **guesses)
        print(json.dumps(table.to_dict()) if args.json else table)
        return 0
    result = simulate.simulate(trace, args.policy, args.slots, args.scope, nbytes, **guesses)
    print(json.dumps(result.to_dict()) if args.json else f"{result} (modelled)")
    return 0

"""`mixoff plan`: whether a model fits a machine, and how fast it may be there."""

from __future__ import annotations

import argparse
import sys

from mixoff.commands import arguments, options, terminal

HELP = "what a model needs, where its bytes go, whether it fits, and how fast it runs"


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add, whole = parser.add_argument, arguments.whole
    add("source", metavar="SOURCE", help="model folder, .gguf file, config.json, bundled model, or Hub id")
    sizes = {
        "--fast": "whole fast memory, as in 14.75GiB",
        "--ram": "RAM that is free for experts, as in 12.7GB",
        "--disk": "disk that is free for the store",
    }
    for name, text in sizes.items():
        add(name, type=arguments.size, metavar="SIZE", help=f"{text} (default the hardware's)")
    context = whole("context", "plan for at least one token")
    add("--context", type=context, default=4096, metavar="N", help="tokens in the KV cache")
    add("--batch", type=whole("batch", "plan for at least one sequence"), default=1, metavar="N", help="batch size")
    options.scheme(add, "quantization: SCHEMES (default: that of run, 16 bits for a plain checkpoint)")
    options.kv_bits(add)
    text = "t4, rtx-3060, ..., or 'here', measured once (default here; with --fast or --ram a T4)"
    add("--hardware", type=arguments.machine, metavar="NAME", help=text)
    add("--refresh", action="store_true", help="measure this machine again")
    add("--verbose", action="store_true", help="show every byte, all advice, and the origin of each figure")


def main(args: argparse.Namespace) -> int:
    """Print the plan."""
    source = arguments.plan_source(args.source)
    with terminal.starting(f"planning {source}"):
        from mixoff.planning import planner, probe
        from mixoff.planning.plan import LABEL
        from mixoff.store import describe

        if args.refresh:
            probe.probe(cached=False)
        described = args.fast or args.ram  # a machine that is not this one
        settings = {name: getattr(args, name) for name in ("context", "batch", "kv_bits")}
        settings["hardware"] = args.hardware or (planner.DEFAULT if described else "here")
        settings["scheme"] = args.scheme or describe.default_scheme(source)
        plan = planner.plan(source, args.fast, args.ram, args.disk, **settings)
    if args.json:
        print(plan.to_json())
    else:
        print(terminal.fold(str(plan) if args.verbose else plan.brief(), sys.stdout, LABEL))
    return 0

"""`mixoff plan`: whether a model fits a machine, and how fast it may be there."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mixoff.commands import arguments, options, terminal

if TYPE_CHECKING:
    from mixoff.planning.plan import Plan

HELP = "what a model needs, where its bytes go, whether it fits, and how fast it runs"


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add, whole = parser.add_argument, arguments.whole
    add("source", metavar="SOURCE", help="model folder, config.json, bundled model, or Hub id")
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
    options.scheme(add, "quantization: SCHEMES (default mixed, or that of a store)")
    text = "t4, rtx-3060, ..., or 'here', measured once (default t4)"
    add("--hardware", type=arguments.machine, metavar="NAME", help=text)
    add("--refresh", action="store_true", help="with --hardware here: measure this machine again")


def main(args: argparse.Namespace) -> int:
    """Print the plan."""
    source = arguments.plan_source(args.source)
    with terminal.starting(f"planning {source}"):
        from mixoff.planning import planner, probe

    if args.refresh:
        probe.probe(cached=False)
    settings = {name: getattr(args, name) for name in ("context", "batch", "scheme", "hardware")}
    plan = planner.plan(source, args.fast, args.ram, args.disk, **settings)
    print(plan.to_json() if args.json else f"{_heading(args, plan)}\n{plan}")
    return 0


def _heading(args: argparse.Namespace, plan: Plan) -> str:
    """The planned machine and scheme, and how to plan what `run` and `convert` do by default."""
    other = [] if args.hardware or args.fast else ["--hardware here plans for this machine"]
    other += [] if args.scheme or plan.scheme == "none" else ["--scheme none for 16 bits, as run and convert have them"]
    text = f"{'a plan':<12} for {plan.hardware.name}, with experts as {plan.scheme}"
    return f"{text} ({', '.join(other)})" if other else text

"""`mixoff bench`: speed of a store or shape, of its peers, and of the bundled model.

Without a store or a shape it measures the bundled model by budget, unless the result is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mixoff import models
from mixoff.commands import arguments, options, terminal
from mixoff.errors import MixoffError, suggestion
from mixoff.units import format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from mixoff.bench.budgets import Table
    from mixoff.bench.compare import Settings
    from mixoff.bench.report import Report


HELP = "tokens/s of a store, a shape or the bundled model, next to the limits of this machine"
ROUTINGS = {"mixtral": "mixtral-8x7b", "uniform": "uniform", "model": "model"}
ASK_FROM = 1 << 30  # bytes: ask before writing files larger than this


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add, whole, size = parser.add_argument, arguments.whole, arguments.size
    add("store", nargs="?", metavar="STORE", help="folder of a store, or Hub id (default the bundled model, by budget)")
    add(
        "--shape",
        help="store of this shape, random weights: mixtral-8x7b, mixtral-3b, mixtral-700m, qwen3-30b-a3b, or a Hub id",
    )
    options.scheme(add, "quantization of --shape: SCHEMES", "mixed")
    text = "where files for --shape are written and kept (default the user's cache folder)"
    add("--folder", metavar="FOLDER", help=text)
    add("--yes", action="store_true", help="write large files without asking")
    add("--routing", default="mixtral", help="mixtral, uniform, or model for the model's own routers")
    repeat = arguments.real("repeat", "give a share of 0 to 1", 0.0, 1.0)
    add("--repeat", type=repeat, metavar="R", help="tune the routing to this share of experts used again")
    text = "experts in the fast tier (default what the plan leaves of memory)"
    add("--fast-bytes", type=size, metavar="SIZE", help=text)
    options.io(add)
    text = "real memory limit for every contender, page cache included: 9G (default none)"
    add("--memory-limit", type=size, metavar="SIZE", help=text)
    options.threads(add, "threads of every contender", 1)
    tokens = whole("tokens", "give at least one token, and at most a million", 1, 10**6)
    text = "tokens decoded in each run (default 32; bundled model: 64)"
    add("--tokens", "--max-new-tokens", type=tokens, metavar="N", help=text)
    add("--prompt-tokens", type=tokens, default=64, metavar="N", help="tokens of the prompt")
    warmup = whole("warmup", "give 0 or more tokens", 0, 10**6)
    text = "tokens decoded before the clock starts, after a prompt of full length"
    add("--warmup", type=warmup, default=8, metavar="N", help=text)
    runs = whole("runs", "measure at least once", 1, 10**6)
    add("--runs", type=runs, metavar="N", help="runs of each contender, in turns (default 3; bundled model: 5)")
    text = "any of transformers,accelerate,mmap (default none)"
    add("--peers", metavar="LIST", help=text)
    text = "llama.cpp's program llama-bench, or a fork's, as a peer: its path and options; may be repeated"
    add("--llama-bench", action="append", default=[], metavar="[NAME=]COMMAND", help=text)
    add("--checkpoint", metavar="FOLDER", help="16-bit copy of STORE, for transformers and accelerate")
    add("--gguf", metavar="FILE", help="copy of STORE for llama.cpp")
    add("--ablations", action="store_true", help="measure without pre-loading, without a cache, and by layer, too")
    add("--record", metavar="FILE", help="file for all figures that compare this machine with its prediction")


def main(args: argparse.Namespace) -> int:
    """Measure, and print a table."""
    report = run(args)
    print(json.dumps(report.to_dict()) if args.json else report)
    return 0


def run(args: argparse.Namespace) -> Table | Report:
    """Measure what was asked for; progress goes to standard error."""
    check(args)
    terminal.quiet_transformers()
    if args.store is None and args.shape is None and not args.record:
        from mixoff.bench import budgets

        return budgets.run(args.runs or 5, args.tokens or 64, args.threads)
    from mixoff.bench import compare

    report = compare.compare(_settings(args), lambda line: print(line, file=sys.stderr))
    if args.record:
        from mixoff.bench import record

        record.write(record.of_report(report), args.record)
    return report


def check(args: argparse.Namespace) -> None:
    """Check what can be checked before anything is imported or written. Raises MixoffError."""
    if args.store is not None:
        arguments.model(args.store)
    if args.routing not in ROUTINGS:
        way_out = f"choose one of {', '.join(ROUTINGS)}{suggestion(args.routing, ROUTINGS)}"
        raise MixoffError(f"unknown routing {args.routing!r}: {way_out}")
    if peers := _peers(args):
        from mixoff.bench.compare import PEERS

        if unknown := sorted(set(peers) - set(PEERS)):
            way_out = f"choose from {', '.join(PEERS)}{suggestion(unknown[0], PEERS)}"
            raise MixoffError(f"unknown peer {unknown[0]!r}: {way_out}")
    if args.record is not None:
        arguments.new_file(args.record)
    for path in (args.checkpoint, args.gguf):
        if path is not None and not os.path.exists(path):
            raise MixoffError(f"{path} does not exist: check the path")


def _peers(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(filter(None, (args.peers or "").split(",")))


def _commands(args: argparse.Namespace) -> tuple[tuple[str, str], ...]:
    """Names and commands of llama-bench. Raises MixoffError for a name that is given twice."""
    from mixoff.bench.llama_bench import named

    commands = tuple(map(named, args.llama_bench))
    if len({name for name, _ in commands}) < len(commands):
        raise MixoffError("two peers have the same name: give each its own, as in --llama-bench NAME=COMMAND")
    return commands


def _settings(args: argparse.Namespace) -> Settings:
    from mixoff.bench.compare import Settings

    files = {"checkpoint": args.checkpoint, "gguf": args.gguf} | _named(args.store or models.names()[0])
    if args.shape:
        files = _write_files(args, _peers(args)) | {"name": f"{args.shape} as {args.scheme}, random weights"}
    return Settings(
        **files,
        threads=args.threads,
        prompt_tokens=args.prompt_tokens,
        tokens=args.tokens or 32,
        rounds=args.runs or 3,
        warmup=args.warmup,
        routing=ROUTINGS[args.routing],
        repeat=args.repeat,
        fast_bytes=None if args.fast_bytes is None else parse_nbytes(args.fast_bytes),
        io=args.io,
        memory_limit=None if args.memory_limit is None else parse_nbytes(args.memory_limit),
        peers=_peers(args),
        ablations=args.ablations,
        llama_bench=_commands(args),
    )


def _named(model: str) -> dict[str, str | None]:
    """Folder and name of a model, downloaded if it is on the Hub. A local folder has no name."""
    from mixoff.checkpoints.find import find

    folder = find(model)
    return {"store": str(folder.path), "name": folder.name}


# Files ----------------------------------------------------------------------------------------------------------------


def _write_files(args: argparse.Namespace, peers: tuple[str, ...]) -> dict[str, str | None]:
    """The store of the shape and the files that its peers need, written unless they exist."""
    from mixoff import folders
    from mixoff.bench import synthetic

    folder = Path(args.folder) if args.folder else folders.cache_folder() / "bench"
    name = Path(args.shape).name.lower()
    paths = {"store": folder / f"{name}-{args.scheme}"}
    if {"transformers", "accelerate"} & set(peers):
        paths["checkpoint"] = folder / f"{name}-16bit"
    if args.llama_bench:
        paths["gguf"] = folder / f"{name}-q2_k.gguf"
    schemes = {"store": args.scheme, "checkpoint": "none", "gguf": "mixed"}  # a Q2_K file is as large as a mixed store
    writers: dict[str, Callable[[Path], object]] = {
        "store": lambda path: synthetic.write_store(args.shape, args.scheme, path),
        "checkpoint": lambda path: synthetic.write_checkpoint(args.shape, path),
        "gguf": lambda path: _write_gguf(args.shape, path),
    }
    for kind, path in paths.items():
        if not path.exists():
            _ask(path, synthetic.store_nbytes(args.shape, schemes[kind]), args.yes)
        writers[kind](path)
    return {kind: str(path) for kind, path in paths.items()}


def _ask(path: Path, nbytes: int, yes: bool) -> None:
    """Ask whether a large file may be written. Raises MixoffError if the answer is no, or without a terminal."""
    if nbytes < ASK_FROM or yes:
        return
    size = format_nbytes(nbytes)
    if not sys.stdin.isatty():
        raise MixoffError(f"refusing to write {size} to {path} without confirmation: pass --yes or --folder")
    text = f"{path} does not exist yet: write {size} of random weights there?"
    print(f"{text} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise MixoffError("nothing was written")


def _write_gguf(shape: str, path: Path) -> None:
    from mixoff.bench import gguf_file, synthetic

    gguf_file.write(path, synthetic.config_of(shape).to_dict())

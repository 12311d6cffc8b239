"""The options of `mixoff bench`, and what follows from them: models to write first, contenders to compare.

Without a store or a shape it measures the bundled model, by budget unless that is to be recorded. Does not know any
arithmetic.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mixoff import models
from mixoff.commands import arguments
from mixoff.errors import MixoffError, suggestion
from mixoff.units import format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from mixoff.bench.budgets import Table
    from mixoff.bench.compare import Settings
    from mixoff.bench.report import Report


ROUTINGS = {"mixtral": "mixtral-8x7b", "uniform": "uniform", "model": "model"}
ASK_FROM = 1 << 30  # bytes of files that are not written without a word


def add_options(command: argparse.ArgumentParser) -> None:
    """Every option of `mixoff bench`."""
    add = command.add_argument
    add("store", nargs="?", metavar="STORE", help="folder of a store, or a Hub id; none: the bundled model by budget")
    add("--shape", help="a store of this shape, random weights: mixtral-8x7b, mixtral-3b, mixtral-700m, or a Hub id")
    scheme, count = arguments.choice("no scheme", arguments.SCHEMES), arguments.whole
    add(
        "--scheme",
        type=scheme,
        default="mixed",
        help="quantization of --shape: mixed, paper, small, quality or none (mixed)",
    )
    add("--folder", metavar="FOLDER", help="where what --shape needs is written, and kept (the user's cache folder)")
    add("--yes", action="store_true", help="write large files without asking")
    add("--routing", default="mixtral", help="mixtral, uniform, or model for the model's own routers (mixtral)")
    share = arguments.real("repeat", "give a share of 0 to 1", 0.0, 1.0)
    add("--repeat", type=share, metavar="R", help="tune the routing to this share of experts asked for again")
    add(
        "--fast-bytes",
        type=arguments.size,
        metavar="SIZE",
        help="experts in the fast tier (what the plan leaves of memory)",
    )
    add(
        "--io",
        type=arguments.choice("no io", arguments.IO),
        default="auto",
        help="how misses are read: auto, direct (past the page cache) or buffered (auto)",
    )
    add(
        "--memory-limit",
        type=arguments.size,
        metavar="SIZE",
        help="run every contender inside a real limit: 9G, page cache included",
    )
    add(
        "--threads",
        type=count("threads", "give at least one thread, of at most 1024", 1, 1024),
        default=1,
        help="of every contender (1)",
    )
    tokens = count("tokens", "give at least one token, and at most a million", 1, 10**6)
    add("--tokens", "--max-new-tokens", type=tokens, metavar="N", help="decoded in each run (32; bundled model: 64)")
    add("--prompt-tokens", type=tokens, default=64, metavar="N", help="read before them (64)")
    add(
        "--warmup",
        type=count("warmup", "give 0 or more tokens", 0, 10**6),
        default=8,
        metavar="N",
        help="decoded before the clock runs (8)",
    )
    add(
        "--runs",
        type=count("runs", "measure at least once", 1, 10**6),
        help="of each contender, in turns (3; bundled model: 5)",
    )
    add("--peers", default="", metavar="LIST", help="of transformers,accelerate,mmap,llama.cpp,llama.cpp-mapped")
    add("--llama-python", default=sys.executable, metavar="PATH", help="interpreter with llama-cpp-python (this one)")
    add("--checkpoint", metavar="FOLDER", help="16-bit copy of STORE, for transformers and accelerate")
    add("--gguf", metavar="FILE", help="copy of STORE for llama.cpp")
    add("--ablations", action="store_true", help="also without pre-loading, without a cache, and layer by layer")
    add("--record", metavar="FILE", help="write all that compares this machine with its prediction")


def run(args: argparse.Namespace) -> Table | Report:
    """Measure what was asked for; progress goes to standard error."""
    check(args)
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
    """Refuse what can be seen to be wrong before anything is imported or written."""
    if args.store is not None:
        arguments.model(args.store)
    if args.routing not in ROUTINGS:
        way_out = f"choose one of {', '.join(ROUTINGS)}{suggestion(args.routing, ROUTINGS)}"
        raise MixoffError(f"no routing {args.routing!r}: {way_out}")
    if peers := _peers(args):
        from mixoff.bench.compare import PEERS

        if unknown := sorted(set(peers) - set(PEERS)):
            way_out = f"choose among {', '.join(PEERS)}{suggestion(unknown[0], PEERS)}"
            raise MixoffError(f"no peer {unknown[0]!r}: {way_out}")
    if args.record is not None:
        arguments.new_file(args.record)
    for path in (args.checkpoint, args.gguf):
        if path is not None and not os.path.exists(path):
            raise MixoffError(f"nothing is at {path}: check the path")


def _peers(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(filter(None, args.peers.split(",")))


def _settings(args: argparse.Namespace) -> Settings:
    from mixoff.bench.compare import Settings

    limit = None if args.memory_limit is None else parse_nbytes(args.memory_limit)
    files = {"checkpoint": args.checkpoint, "gguf": args.gguf} | _named(args.store or models.names()[0])
    if args.shape:
        files = _written(args, _peers(args)) | {"name": f"{args.shape} as {args.scheme}, random weights"}
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
        memory_limit=limit,
        peers=_peers(args),
        ablations=args.ablations,
        llama_python=args.llama_python,
    )


def _named(model: str) -> dict[str, str | None]:
    """Folder and name of a model; one that is on the Hub is fetched. A folder of the user's own has no name."""
    from mixoff.checkpoints import hub, names

    if model in models.names():
        return {"store": str(models.path(model)), "name": model}
    if (found := names.parse(model)) is not None:
        return {"store": str(hub.snapshot(found)), "name": model}
    return {"store": model, "name": None}


# Files ----------------------------------------------------------------------------------------------------------------


def _written(args: argparse.Namespace, peers: tuple[str, ...]) -> dict[str, str | None]:
    """The store of the shape, and what its peers need beside it, written where they are missing."""
    from mixoff import folders
    from mixoff.bench import synthetic

    folder = Path(args.folder) if args.folder else folders.cache_folder() / "bench"
    name = Path(args.shape).name.lower()
    paths = {"store": folder / f"{name}-{args.scheme}"}
    paths |= {"checkpoint": folder / f"{name}-16bit"} if {"transformers", "accelerate"} & set(peers) else {}
    paths |= {"gguf": folder / f"{name}-q2_k.gguf"} if any(peer.startswith("llama.cpp") for peer in peers) else {}
    schemes = {"store": args.scheme, "checkpoint": "none", "gguf": "mixed"}  # a Q2_K file is as large as a mixed store
    makers: dict[str, Callable[[Path], object]] = {
        "store": lambda path: synthetic.write_store(args.shape, args.scheme, path),
        "checkpoint": lambda path: synthetic.write_checkpoint(args.shape, path),
        "gguf": lambda path: _write_gguf(args, path),
    }
    for kind, path in paths.items():
        if not path.exists():
            _ask(path, synthetic.store_nbytes(args.shape, schemes[kind]), args.yes)
        makers[kind](path)
    return {kind: str(path) for kind, path in paths.items()}


def _ask(path: Path, nbytes: int, yes: bool) -> None:
    """Ask whether a large file may be written. Raises MixoffError for a no, and where nobody can answer."""
    if nbytes < ASK_FROM or yes:
        return
    text = f"{path} does not exist yet: write {format_nbytes(nbytes)} of random weights there?"
    if not sys.stdin.isatty():
        raise MixoffError(f"{text} Say --yes, or name another place with --folder")
    print(f"{text} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise MixoffError("nothing was written")


def _write_gguf(args: argparse.Namespace, path: Path) -> None:
    from mixoff.bench import synthetic
    from mixoff.bench.compare import environment

    config = synthetic.config_of(args.shape).to_json_string(use_diff=False)
    words = [args.llama_python, "-m", "mixoff.bench.gguf_file", str(path), config]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(1))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MixoffError(f"could not write {path} ({last}): --llama-python names an interpreter with llama-cpp-python")

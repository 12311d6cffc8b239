"""`mixoff convert`: write a checkpoint as a store, with progress on standard error."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mixoff.commands import arguments, options, terminal
from mixoff.store.inventory import nbytes_of

if TYPE_CHECKING:
    from mixoff.store.losses import Loss

HELP = "write a checkpoint as a store: one aligned byte range per expert"
EVERY_S = terminal.EVERY_S


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="folder of a checkpoint, GGUF file, bundled model, or Hub id (org/model@rev)",
    )
    add("target", metavar="TARGET", help="folder to create; must not exist")
    options.scheme(add, "quantization: SCHEMES", "none")
    options.threads(add, "threads that quantize (default all cores)", name="jobs")
    text = "quantize for the inputs that a text gives: a file, or the bundled text if no file is named; slower, better"
    add("--calibrate", nargs="?", const="default", metavar="FILE", help=text)
    text = "bits per weight of experts, divided among layers and matrices where they help most; needs --calibrate"
    add("--bits", type=_bits, metavar="B", help=text)
    add("--restart", action="store_true", help="start from scratch, even if an earlier run was interrupted")


def main(args: argparse.Namespace) -> int:
    """Convert, and print the store's size, time and memory."""
    arguments.new_folder(args.target)
    arguments.model(args.source)
    with terminal.starting(f"converting {args.source}"):
        from mixoff.conversion import convert
        from mixoff.loading import warmup
        from mixoff.quantize.scheme import Scheme
        from mixoff.store import making
        from mixoff.units import format_nbytes

    compile_s = warmup.compile_solvers(Scheme.preset(args.scheme), terminal.say)
    settings = making.Options(args.jobs, args.restart, progress=False if args.json else None)
    if args.calibrate:
        tokens, nbytes = convert.needs(args.source, args.calibrate)
        terminal.say(f"calibrating on {tokens:,} tokens: up to {format_nbytes(nbytes)} of memory (modelled)")
    with progress_lines(args.target, quiet=args.json):
        done = convert.run(args.source, args.target, args.scheme, args.calibrate, args.bits, options=settings)
    nbytes = nbytes_of(done.target)
    lost = _losses(args.source, done.target)
    rate = done.source_nbytes / done.seconds / 1e6
    if args.json:
        report = {
            "target": str(done.target),
            "nbytes": nbytes,
            "source_nbytes": done.source_nbytes,
            "compile_s": compile_s,
            "seconds": done.seconds,
            "MB_per_s": rate,
            "peak_nbytes": done.peak_nbytes,
            "losses": [asdict(loss) for loss in lost],
        }
        print(json.dumps(report))
        return 0
    took = f"{done.seconds:.1f} s, {rate:.0f} MB/s of weights, {format_nbytes(done.peak_nbytes)} of memory (measured)"
    for loss in lost:
        print(loss)
    print(f"wrote {done.target}: {format_nbytes(nbytes)} in {took}")
    return 0


def _losses(source: str, target: Path) -> list[Loss]:
    """What became of the weights of an encoded checkpoint; nothing for others, whose weights are all treated alike."""
    from mixoff.checkpoints.find import here

    folder = here(source)
    if folder is None or folder.kind in ("plain", "published", "config", "store"):
        return []
    from mixoff.store.losses import losses

    return losses(folder.checkpoint(), target)


def _bits(text: str) -> float:
    """A number of bits per weight, from 2 to 16."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 2 <= value <= 16:
        raise argparse.ArgumentTypeError(f"bits is {text!r}: give a number from 2 to 16, as in 2.5")
    return value


@contextmanager
def progress_lines(target: str, quiet: bool) -> Iterator[None]:
    """Print a line of progress from time to time where standard error is not a terminal, which shows a bar."""
    shown = not quiet and not sys.stderr.isatty()
    with terminal.ticking(lambda: converted(f"{target}.partial/store"), EVERY_S) if shown else nullcontext():
        yield


def converted(store: str) -> str | None:
    """How much of a store is written; None while its files are laid out."""
    from mixoff.units import format_nbytes

    with suppress(OSError):  # files come and go
        stats = [entry.stat() for entry in os.scandir(store)]
        # files have their final size from the start: what was written shows in their blocks
        written = sum(min(512 * getattr(s, "st_blocks", s.st_size // 512), s.st_size) for s in stats)
        whole = sum(s.st_size for s in stats)
        return f"converted {format_nbytes(written)} of {format_nbytes(whole)}" if written else None
    return None

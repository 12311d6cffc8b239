"""`mixoff export`: write a store or a checkpoint for another engine."""

from __future__ import annotations

import argparse
import json

from mixoff.commands import arguments, convert, terminal

HELP = "write a store's weights for vLLM, transformers or llama.cpp"
FORMATS = ("hf", "compressed-tensors", "gguf")


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("source", metavar="STORE", help="store, folder of a checkpoint, or GGUF file")
    add("target", metavar="OUT", help="folder to create, or file for gguf; must not exist")
    text = "hf (safetensors in 16 bits), compressed-tensors (experts in 4 or 8 bits), or gguf (4, 5, 8 or 16 bits)"
    add("--to", type=arguments.choice("format", FORMATS), required=True, help=text)
    text = "bits of experts (default: 4 for compressed-tensors from an original, else 8; 16 for gguf)"
    add("--bits", type=arguments.whole("bits", "give 4, 5, 8 or 16"), metavar="B", help=text)


def main(args: argparse.Namespace) -> int:
    """Export, and print the size, before and after."""
    arguments.new_folder(args.target)
    arguments.model(args.source)
    with terminal.starting(f"exporting {args.source}"):
        from mixoff.export.run import export
        from mixoff.units import format_nbytes

    def planned(nbytes: int) -> None:
        terminal.say(f"{args.target} will take {format_nbytes(nbytes)}")

    with convert.progress_lines(args.target, quiet=args.json):
        quiet = False if args.json else None
        done = export(args.source, args.target, args.to, bits=args.bits, progress=quiet, planned=planned)
    nbytes = convert.nbytes_of(done.target) or done.target.stat().st_size
    if args.json:
        print(json.dumps({"target": str(done.target), "nbytes": nbytes, "seconds": done.seconds}))
    else:
        took = f"{done.seconds:.1f} s, {format_nbytes(done.peak_nbytes)} of memory (measured)"
        print(f"wrote {done.target}: {format_nbytes(nbytes)} in {took}")
    return 0

"""`mixoff trace`: record the experts that a model uses while it generates."""

from __future__ import annotations

import argparse
import json
import os

from mixoff.commands import arguments, options, terminal

HELP = "record which experts a model uses while it generates"


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("path", metavar="PATH", help=options.PATH)
    add("--prompt-file", required=True, metavar="FILE", help="file with the text to continue")
    options.max_new_tokens(add, 64)
    add("--out", required=True, metavar="FILE", help="trace to write, .npz")
    options.prefetch(add, ", recorded in the trace")
    options.fast_bytes(add)


def main(args: argparse.Namespace) -> int:
    """Generate once, and write the trace."""
    out = args.out if os.path.splitext(args.out)[1] else f"{args.out}.npz"
    prompt = arguments.text_of(args.prompt_file)
    arguments.new_file(out, ".npz")
    arguments.model(args.path)
    with terminal.starting(f"loading {args.path}"):
        from mixoff.loading import load
        from mixoff.text import generation
        from mixoff.units import format_nbytes

    with load.load(args.path, args.fast_bytes, prefetch=args.prefetch) as model:
        tokenizer = generation.load_tokenizer(model.mixoff.source.folder)
        with model.mixoff.trace() as recorder:
            generation.generate(model, tokenizer, prompt, args.max_new_tokens)
    trace = recorder.trace
    out = trace.save(out)
    report = {
        "out": str(out),
        "tokens": trace.tokens,
        "prompt_tokens": int(trace.is_prompt.sum()),
        "layers": len(trace.layers),
        "top_k": trace.top_k,
        "num_experts": trace.num_experts,
        "nbytes": out.stat().st_size,
        "expert_nbytes": trace.expert_nbytes,
        "predicted": trace.predicted is not None,
    }
    print(json.dumps(report) if args.json else f"wrote {out}: {trace}, {format_nbytes(report['nbytes'])}")
    return 0

"""The command line: `mixoff demo, run, convert, verify, bench, trace, simulate, plan, doctor`.

Every command takes `--json`: then standard output holds one JSON object and nothing else. What is wrong with a
request is one line on standard error and exit code 2. Does not know any arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mixoff import __version__
from mixoff.errors import CheckpointError, MixoffError

SCHEMES = "mixed, paper, small, quality or none"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    _hush()
    try:
        return args.run(args)
    except MixoffError as error:
        print(f"mixoff: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"mixoff: {interrupt}" if interrupt.args else "mixoff: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """argparse, which says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mixoff: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mixoff", description="Mixture-of-Experts models in less memory than they need, exactly.")
    parser.add_argument("--version", action="version", version=f"mixoff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    adders = _add_demo, _add_run, _add_convert, _add_verify, _add_bench, _add_trace, _add_simulate, _add_plan
    for add in (*adders, _add_doctor):
        add(commands)
    return parser


def _hush() -> None:
    """No progress bars or advice from libraries between our lines, and no spinning threads between our products."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # read when torch is imported: its OpenMP threads would spin on the cores that our kernels want (docs/benchmarks.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _add_command(commands: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    command.set_defaults(run=run)
    return command


def _add_budget(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--fast-bytes",
        default=default,
        metavar="SIZE",
        help=f"bytes of experts in the fast tier, as in 500MB or 6GiB; auto: 6GiB, or what a GPU has free ({default})",
    )


def _add_demo(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands, "demo", _demo, "watch the bundled model write with most of its experts outside the fast tier"
    )
    _add_budget(command, "6MB")
    command.add_argument("--prompt", help="text to continue")
    command.add_argument("--max-new-tokens", type=int, default=160, metavar="N")
    command.add_argument("--seed", type=int, default=3)
    command.add_argument("--svg", metavar="FILE", help="also save a picture of the last screen")


def _demo(args: argparse.Namespace) -> int:
    _quiet_transformers()
    from mixoff import demo

    return demo.run(
        args.fast_bytes, args.prompt or demo.PROMPT, args.max_new_tokens, args.seed, args.svg, as_json=args.json
    )


def _add_run(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "run", _run, "generate text from a store, or from a plain checkpoint folder")
    command.add_argument("path", metavar="PATH", help="folder of a store or checkpoint, bundled model, or Hub id")
    command.add_argument("--prompt", required=True, help="text to continue")
    command.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    _add_budget(command, "auto")
    command.add_argument("--scheme", help=f"quantize a plain checkpoint first: {SCHEMES}")
    command.add_argument(
        "--scope", default="layer", help="'layer': slots of each MoE layer apart; 'global': one pool (layer)"
    )
    command.add_argument("--policy", default="lru", help="which resident to evict (lru)")
    command.add_argument("--ram-bytes", metavar="SIZE", help="a tier of copies in RAM before the disk (none)")
    command.add_argument("--prefetch", default="auto", help="guesses: auto, none or next-router (auto)")
    command.add_argument("--io", default="auto", help="reads: auto, direct (past the page cache) or buffered (auto)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto: a GPU where there is one)")
    command.add_argument("--dtype", default="auto", help="of the computation: auto, float32, bfloat16, float16 (auto)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy; else sample (0)")
    command.add_argument("--seed", type=int, default=0, help="of sampling (0)")


def _run(args: argparse.Namespace) -> int:
    _quiet_transformers()
    from mixoff import generation, loading

    how = {"scheme": args.scheme, "policy": args.policy, "scope": args.scope, "dtype": args.dtype}
    how |= {"ram_bytes": args.ram_bytes, "prefetch": args.prefetch, "io": args.io, "device": args.device}
    with loading.load(args.path, args.fast_bytes, **how) as model:
        tokenizer = generation.load_tokenizer(model.mixoff.source.folder)
        on_text = None if args.json else lambda piece: print(piece, end="", flush=True)
        result = generation.generate(
            model, tokenizer, args.prompt, args.max_new_tokens, args.temperature, args.seed, on_text
        )
        info, device = model.mixoff.info(), str(model.device)
    report = {"text": result.text, "token_ids": result.token_ids, "tokens_per_s": result.tokens_per_s} | info.to_dict()
    report |= {"slots": info.capacity, "device": device}
    print(json.dumps(report) if args.json else f"\n\n{result.tokens_per_s:.1f} tokens/s (measured) on {device}; {info}")
    return 0


def _add_convert(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "convert", _convert, "write a checkpoint as a store: one aligned range an expert")
    command.add_argument(
        "source", metavar="SOURCE", help="folder of a plain checkpoint, bundled model, or Hub id (org/model@revision)"
    )
    command.add_argument("target", metavar="TARGET", help="folder to make; must not exist")
    command.add_argument("--scheme", default="none", help=f"quantization: {SCHEMES} (none)")
    command.add_argument("--jobs", type=int, metavar="N", help="threads that quantize (all cores)")
    command.add_argument("--restart", action="store_true", help="begin anew, whatever an earlier run has finished")


def _convert(args: argparse.Namespace) -> int:
    _quiet_transformers()
    from mixoff import conversion
    from mixoff.units import format_nbytes

    progress = False if args.json else None
    done = conversion.run(
        args.source, args.target, args.scheme, jobs=args.jobs, restart=args.restart, progress=progress
    )
    nbytes, rate = sum(p.stat().st_size for p in done.target.iterdir()), done.source_nbytes / done.seconds / 1e6
    report = {"target": str(done.target), "nbytes": nbytes, "source_nbytes": done.source_nbytes}
    report |= {"seconds": done.seconds, "MB_per_s": rate, "peak_nbytes": done.peak_nbytes}
    took = f"{done.seconds:.1f} s, {rate:.0f} MB/s of weights, {format_nbytes(done.peak_nbytes)} of memory (measured)"
    print(json.dumps(report) if args.json else f"wrote {done.target}: {format_nbytes(nbytes)} in {took}")
    return 0


def _add_verify(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "verify", _verify, "check a store: files and sizes, or every byte of it")
    command.add_argument("path", metavar="STORE", help="folder of the store")
    command.add_argument("--full", action="store_true", help="also the SHA-256 of every tensor")


def _verify(args: argparse.Namespace) -> int:
    """Exit code 0 for a sound store, 1 for a damaged one, 2 for what is no store at all."""
    _quiet_transformers()
    from mixoff import store
    from mixoff.units import format_nbytes

    if not store.is_store(args.path):
        raise CheckpointError(f"{args.path} is no store: make one with `mixoff convert`")
    try:
        report = {"ok": True} | store.verify(args.path, args.full)
    except CheckpointError as error:
        report = {"ok": False, "error": str(error)}
    if args.json:
        print(json.dumps(report))
    elif report["ok"]:
        what = "every byte" if args.full else "files and sizes"
        print(f"{what} as written: {report['tensors']} tensors, {format_nbytes(report['nbytes'])}")
    else:
        print(f"mixoff: {report['error']}", file=sys.stderr)
    return 0 if report["ok"] else 1


def _add_bench(commands: argparse._SubParsersAction) -> None:
    from mixoff.bench import command as bench

    command = _add_command(
        commands, "bench", _bench, "tokens/s of a store or shape, or of the bundled model, beside this machine's limits"
    )
    bench.add_options(command)


def _bench(args: argparse.Namespace) -> int:
    _quiet_transformers()
    from mixoff.bench import command

    report = command.run(args)
    print(json.dumps(report.to_dict()) if args.json else report)
    return 0


def _add_trace(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "trace", _trace, "record which experts a model asks for while it generates")
    command.add_argument("path", metavar="PATH", help="folder of a store or checkpoint, bundled model, or Hub id")
    command.add_argument("--prompt-file", required=True, metavar="FILE", help="text to continue")
    command.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    command.add_argument("--out", required=True, metavar="FILE", help="the trace to write, .npz")
    command.add_argument(
        "--prefetch", default="auto", help="auto, none, or next-router, whose guesses the trace then holds (auto)"
    )
    _add_budget(command, "auto")


def _trace(args: argparse.Namespace) -> int:
    _quiet_transformers()
    from mixoff import generation, loading
    from mixoff.units import format_nbytes

    prompt = _read_text(args.prompt_file)
    with loading.load(args.path, args.fast_bytes, prefetch=args.prefetch) as model:
        tokenizer = generation.load_tokenizer(model.mixoff.source.folder)
        with model.mixoff.trace() as recorder:
            generation.generate(model, tokenizer, prompt, args.max_new_tokens)
    trace = recorder.trace
    out = trace.save(args.out)
    report = {"out": str(out), "tokens": trace.tokens, "prompt_tokens": int(trace.is_prompt.sum())}
    report |= {"layers": len(trace.layers), "top_k": trace.top_k, "num_experts": trace.num_experts}
    report |= {"nbytes": out.stat().st_size, "expert_nbytes": trace.expert_nbytes}
    report |= {"predicted": trace.predicted is not None}
    print(json.dumps(report) if args.json else f"wrote {out}: {trace}, {format_nbytes(report['nbytes'])}")
    return 0


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise MixoffError(f"cannot read {path} as text: {getattr(error, 'strerror', None) or error}") from error


def _add_simulate(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "simulate", _simulate, "count the hits and misses that a trace would have")
    command.add_argument(
        "trace", metavar="TRACE", help="file of `mixoff trace`, .csv or .jsonl, or a bundled one: tiny-mixtral/novel"
    )
    command.add_argument(
        "--policy",
        default="lru",
        help="lru, fifo, lfu, lfuda, lfru, random, least-stale, half-life, static, belady, or all, in a table (lru)",
    )
    command.add_argument("--slots", type=int, default=4, metavar="S", help="of each layer (4)")
    scope = command.add_mutually_exclusive_group()
    scope.add_argument("--per-layer", dest="scope", action="store_const", const="layer", help="a pool a layer (this)")
    scope.add_argument("--global", dest="scope", action="store_const", const="global", help="one pool, slots x layers")
    command.add_argument("--expert-nbytes", metavar="SIZE", help="of one expert, for bytes_moved: 221184, 52MiB")
    command.add_argument(
        "--prefetch", default="none", help="none, next-router (of the trace), popularity, oracle, recall=0.86 (none)"
    )
    command.add_argument("--prefetch-nbytes", metavar="SIZE", help="at most so much a layer (top-k experts)")
    command.set_defaults(scope="layer")


def _simulate(args: argparse.Namespace) -> int:
    from mixoff import simulator
    from mixoff.trace import Trace
    from mixoff.units import parse_nbytes

    nbytes, ahead = (x if x is None else parse_nbytes(x) for x in (args.expert_nbytes, args.prefetch_nbytes))
    trace, how = Trace.load(args.trace), {"prefetch": args.prefetch, "prefetch_nbytes": ahead}
    if args.policy == "all":
        table = simulator.compare(trace, args.slots, args.scope, nbytes, **how)
        print(json.dumps(table.to_dict()) if args.json else table)
        return 0
    result = simulator.simulate(trace, args.policy, args.slots, args.scope, nbytes, **how)
    print(json.dumps(result.to_dict()) if args.json else f"{result} (modelled)")
    return 0


def _add_plan(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "plan", _plan, "what a model needs, what lies where, does it fit, and how fast")
    command.add_argument("source", metavar="SOURCE", help="model folder, config.json, bundled model, or Hub id")
    command.add_argument("--fast", metavar="SIZE", help="the whole fast memory, as in 14.75GiB (the hardware's)")
    command.add_argument("--ram", metavar="SIZE", help="RAM that is free for experts, as in 12.7GB (the hardware's)")
    command.add_argument("--disk", metavar="SIZE", help="disk that is free for the store (the hardware's)")
    command.add_argument("--context", type=int, default=4096, metavar="N", help="tokens that the KV cache holds (4096)")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (1)")
    command.add_argument("--scheme", help=f"quantization: {SCHEMES} (mixed, or what a store is in)")
    command.add_argument("--hardware", metavar="NAME", help="t4, rtx-3060, ..., or 'here', measured once (t4)")
    command.add_argument("--refresh", action="store_true", help="with --hardware here: measure this machine anew")


def _plan(args: argparse.Namespace) -> int:
    _quiet_transformers()
    from mixoff import hardware, planner

    if args.refresh:
        hardware.probe(cached=False)
    sizes = args.fast, args.ram, args.disk
    how = {"context": args.context, "batch": args.batch, "scheme": args.scheme, "hardware": args.hardware}
    plan = planner.plan(args.source, *sizes, **how)
    print(plan.to_json() if args.json else plan)
    return 0


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "doctor", _doctor, "versions, memory, bandwidths, and what will work here")
    command.add_argument("--refresh", action="store_true", help="measure bandwidths anew")


def _doctor(args: argparse.Namespace) -> int:
    _quiet_transformers()
    from mixoff import doctor

    checkup = doctor.examine(cached=not args.refresh)
    print(checkup.to_json() if args.json else checkup)
    return 0

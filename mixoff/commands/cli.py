"""The command line: `mixoff demo, run, convert, verify, bench, trace, simulate, plan, doctor`.

Every command takes `--json`: then standard output holds one JSON object and nothing else. What is wrong with a
request is one line on standard error and exit code 2, before torch is imported where that can be seen so early. Does
not know any arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO

from mixoff._version import __version__
from mixoff.commands import arguments
from mixoff.errors import CheckpointError, MixoffError, one_line, printable, suggestion

SCHEMES = f"{', '.join(arguments.SCHEMES[:-1])} or {arguments.SCHEMES[-1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _hush()
    for stream in (sys.stdout, sys.stderr):
        _encode_all(stream)
    try:
        args = _parse(argv)
        return args.run(args)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"mixoff: {one_line(interrupt) if interrupt.args else 'interrupted'}", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"mixoff: {_said(error)}", file=sys.stderr)
        if os.environ.get("MIXOFF_TRACEBACK") == "1":
            traceback.print_exception(error)
        return 2


def _said(error: Exception) -> str:
    """One line about what went wrong, and the way out."""
    if isinstance(error, MixoffError):
        return one_line(error)
    if isinstance(error, OSError) and error.errno is not None:
        name = "" if error.filename is None else f"{error.filename}: "
        return one_line(f"the system refuses: {name}{error.strerror}; check that path, its permissions and its disk")
    if isinstance(error, MemoryError):
        return "memory ran out: lower --fast-bytes, or shorten the prompt"
    first = (str(error).strip().splitlines() or [""])[0]
    way_out = "this is a fault of mixoff: please report it with `mixoff doctor`; MIXOFF_TRACEBACK=1 shows where"
    return f"{type(error).__name__}: {one_line(first)[:300]}; {way_out}"


def _encode_all(stream: TextIO) -> None:
    """Let a terminal or file that cannot show a character have a question mark for it, rather than an error."""
    if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


class _Parser(argparse.ArgumentParser):
    """argparse, which says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise MixoffError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = f"no command {value!r}: choose one of {', '.join(action.choices)}"
            raise argparse.ArgumentError(None, known + suggestion(str(value), action.choices))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        option = unknown[0].partition("=")[0]
        raise MixoffError(f"unrecognized arguments: {' '.join(unknown)}{suggestion(option, args.options)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mixoff", description="Mixture-of-Experts models in less memory than they need, exactly.")
    parser.add_argument("--version", action="version", version=f"mixoff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    adders = _add_demo, _add_run, _add_convert, _add_verify, _add_bench, _add_trace, _add_simulate, _add_plan
    for add in (*adders, _add_doctor):
        add(commands)
    for command in commands.choices.values():
        command.set_defaults(options=list(command._option_string_actions))
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


@contextmanager
def _starting(what: str) -> Iterator[None]:
    """Say at once, in a terminal, what is at work while libraries are imported and files opened."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _add_budget(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--fast-bytes",
        default=default,
        type=arguments.size_or_auto,
        metavar="SIZE",
        help=f"bytes of experts in the fast tier, as in 500MB or 6GiB; auto: 6GiB, or what a GPU has free ({default})",
    )


SEED = arguments.whole("seed", "give a whole number of at most 64 bits", -(2**63), 2**64 - 1)


def _add_tokens(command: argparse.ArgumentParser, default: int) -> None:
    kind = arguments.whole("max_new_tokens", "ask for at least one token")
    command.add_argument("--max-new-tokens", type=kind, default=default, metavar="N", help=f"at most ({default})")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands, "demo", _demo, "watch the bundled model write with most of its experts outside the fast tier"
    )
    _add_budget(command, "6MB")
    command.add_argument("--prompt", type=arguments.words, help="text to continue")
    _add_tokens(command, 160)
    command.add_argument("--seed", type=SEED, default=3)
    command.add_argument("--svg", metavar="FILE", help="also save a picture of the last screen")


def _demo(args: argparse.Namespace) -> int:
    if args.svg:
        arguments.new_file(args.svg)
    with _starting("loading tiny-mixtral"):
        _quiet_transformers()
        from mixoff.commands import demo

    return demo.run(
        args.fast_bytes, args.prompt or demo.PROMPT, args.max_new_tokens, args.seed, args.svg, as_json=args.json
    )


def _add_run(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "run", _run, "generate text from a store, or from a plain checkpoint folder")
    add = command.add_argument
    add("path", metavar="PATH", help="folder of a store or checkpoint, bundled model, or Hub id")
    add("--prompt", type=arguments.words, help="text to continue; - or none reads it from standard input")
    add("--system", type=arguments.words, metavar="TEXT", help="take the prompt as a question, under this message")
    _add_tokens(command, 64)
    _add_budget(command, "auto")
    scheme = arguments.choice("no scheme", arguments.SCHEMES)
    add("--scheme", type=scheme, help=f"quantize a plain checkpoint first, and keep that: {SCHEMES}")
    scope, io = arguments.choice("no scope", arguments.SCOPES), arguments.choice("no io", arguments.IO)
    add("--scope", type=scope, default="layer", help="slots of each MoE layer apart, or 'global': one pool (layer)")
    add("--policy", type=arguments.policy, default="lru", help="which resident to evict (lru)")
    add("--ram-bytes", type=arguments.size, metavar="SIZE", help="a tier of copies in RAM before the disk (none)")
    add("--prefetch", type=PREFETCH, default="auto", help="guesses: auto, none or next-router (auto)")
    add("--io", type=io, default="auto", help="reads: auto, direct (past the page cache) or buffered (auto)")
    device = "auto, cpu, cuda or cuda:N (auto: a GPU where there is one)"
    add("--device", type=arguments.device, default="auto", help=device)
    dtype = arguments.choice("no dtype", arguments.DTYPES, arguments.SHORT)
    add("--dtype", type=dtype, default="auto", help="of the computation: auto, float32, bfloat16, float16 (auto)")
    context = arguments.whole("context", "give at least two tokens", 2)
    add("--context", type=context, metavar="N", help="tokens at most, prompt and new ones together (the model's)")
    add("--threads", type=THREADS, metavar="N", help="that compute (all cores)")
    _add_sampling(command)


PREFETCH = arguments.choice("no prefetch", arguments.PREFETCH)
THREADS = arguments.whole("threads", "give at least one thread, of at most 1024", 1, 1024)


def _add_sampling(command: argparse.ArgumentParser) -> None:
    add, whole, real = command.add_argument, arguments.whole, arguments.real
    warm = real("temperature", "give 0, which is greedy, or a positive number")
    add("--temperature", type=warm, default=0.0, help="0 is greedy; else sample (0)")
    share = real("top_p", "give a share above 0, up to 1", 1e-9, 1.0)
    add("--top-p", type=share, metavar="P", help="sample among the likeliest tokens that have this share (all)")
    add("--top-k", type=whole("top_k", "give a whole number of at least 1", 1, 2**31 - 1), metavar="K",
        help="sample among so many likeliest tokens (all)")  # fmt: skip
    add("--seed", type=SEED, default=0, help="of sampling (0)")
    add("--stop", type=arguments.words, action="append", metavar="TEXT", help="end after it; may be given again")


def _prompt(text: str | None) -> str:
    """The prompt, from standard input where it is `-`, or not given and something is piped in."""
    if text not in (None, "-"):
        return text
    if text is None and sys.stdin.isatty():
        raise MixoffError("the following arguments are required: --prompt (or pipe the prompt in)")
    try:
        raw = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
        return raw.decode().removesuffix("\n")
    except (OSError, ValueError) as error:
        raise MixoffError(f"cannot read the prompt from standard input ({one_line(error)}): give --prompt") from error


def _run(args: argparse.Namespace) -> int:
    arguments.model(args.path)
    prompt, start = _prompt(args.prompt), time.perf_counter()
    with _starting(f"loading {printable(args.path)}"):
        model, tokenizer = _load(args)
    load_s = time.perf_counter() - start
    with model:
        from mixoff.loading import warmup

        compile_s = warmup.compile_for(model, _say)
        result = _generate(args, model, tokenizer, prompt)
        info, device = model.mixoff.info(), str(model.device)
    report = {"text": result.text, "token_ids": result.token_ids, "tokens_per_s": result.tokens_per_s} | info.to_dict()
    report |= {"slots": info.capacity, "device": device, "load_s": load_s, "compile_s": compile_s}
    report |= {"first_token_s": result.first_s, "new_tokens": len(result.token_ids)}
    report |= {"prompt_tokens": result.prompt_tokens, "prompt_tokens_per_s": result.prompt_tokens_per_s}
    if args.json:
        print(json.dumps(report))
        return 0
    print(flush=True)
    prompt_text = f"prompt of {result.prompt_tokens} at {result.prompt_tokens_per_s:.1f} tokens/s"
    speeds = f"{len(result.token_ids)} new at {result.tokens_per_s:.1f} tokens/s (measured) on {device}"
    times = f"{result.first_s:.2f} s to the first, loaded in {load_s:.1f} s"
    print(f"{prompt_text}, {speeds}; {times}; {info}", file=sys.stderr)
    return 0


def _load(args: argparse.Namespace) -> tuple:
    """The model and its tokenizer as `run` is asked for them."""
    _quiet_transformers()
    import torch

    from mixoff.loading import load
    from mixoff.text import generation

    if args.threads:
        torch.set_num_threads(args.threads)
    how = {"scheme": args.scheme, "policy": args.policy, "scope": args.scope, "dtype": args.dtype}
    how |= {"ram_bytes": args.ram_bytes, "prefetch": args.prefetch, "io": args.io, "device": args.device}
    how |= {"context": args.context} if args.context else {}
    model = load.load(args.path, args.fast_bytes, **how)
    try:
        return model, generation.load_tokenizer(model.mixoff.source.folder)
    except BaseException:
        model.mixoff.close()
        raise


def _generate(args: argparse.Namespace, model: object, tokenizer: object, prompt: str) -> object:
    from mixoff.text import chat, generation

    keys = ("temperature", "seed", "top_p", "top_k", "stop")
    how = {key: getattr(args, key) for key in keys} | {"on_text": None if args.json else _show}
    if args.system is None:
        return generation.generate(model, tokenizer, prompt, args.max_new_tokens, context=args.context, **how)
    messages = [{"role": "system", "content": args.system}]
    return chat.Chat(model, tokenizer, messages, args.context).ask(prompt, args.max_new_tokens, **how)


def _show(piece: str) -> None:
    """A piece of a model's text: in a terminal without what it would obey."""
    print(printable(piece, "\n\t") if sys.stdout.isatty() else piece, end="", flush=True)


def _say(line: str) -> None:
    print(f"mixoff: {line}", file=sys.stderr, flush=True)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "convert", _convert, "write a checkpoint as a store: one aligned range an expert")
    command.add_argument(
        "source", metavar="SOURCE", help="folder of a plain checkpoint, bundled model, or Hub id (org/model@revision)"
    )
    command.add_argument("target", metavar="TARGET", help="folder to make; must not exist")
    scheme = arguments.choice("no scheme", arguments.SCHEMES)
    command.add_argument("--scheme", type=scheme, default="none", help=f"quantization: {SCHEMES} (none)")
    jobs = arguments.whole("jobs", "give at least one thread, of at most 1024", 1, 1024)
    command.add_argument("--jobs", type=jobs, metavar="N", help="threads that quantize (all cores)")
    command.add_argument("--restart", action="store_true", help="begin again, whatever an earlier run has finished")


def _convert(args: argparse.Namespace) -> int:
    arguments.new_folder(args.target)
    arguments.model(args.source)
    with _starting(f"converting {printable(args.source)}"):
        _quiet_transformers()
        from mixoff.loading import warmup
        from mixoff.quantize.scheme import Scheme
        from mixoff.store import convert
        from mixoff.units import format_nbytes

    compile_s = warmup.compile_solvers(Scheme.preset(args.scheme), _say)
    with _progress_lines(args.target, quiet=args.json):
        done = convert.run(
            args.source,
            args.target,
            args.scheme,
            jobs=args.jobs,
            restart=args.restart,
            progress=False if args.json else None,
        )
    nbytes, rate = sum(p.stat().st_size for p in done.target.iterdir()), done.source_nbytes / done.seconds / 1e6
    report = {"target": str(done.target), "nbytes": nbytes, "source_nbytes": done.source_nbytes}
    report |= {"compile_s": compile_s, "seconds": done.seconds, "MB_per_s": rate, "peak_nbytes": done.peak_nbytes}
    took = f"{done.seconds:.1f} s, {rate:.0f} MB/s of weights, {format_nbytes(done.peak_nbytes)} of memory (measured)"
    print(json.dumps(report) if args.json else f"wrote {done.target}: {format_nbytes(nbytes)} in {took}")
    return 0


EVERY_S = 10.0  # a line about a conversion whose progress nobody watches in a terminal


@contextmanager
def _progress_lines(target: str, quiet: bool) -> Iterator[None]:
    """Where standard error is no terminal, which has a bar, a line now and then about what is on the disk."""
    ended = threading.Event()
    if not quiet and not sys.stderr.isatty():
        threading.Thread(target=_tell_progress, args=(f"{target}.partial/store", ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _tell_progress(store: str, ended: threading.Event) -> None:
    from mixoff.units import format_nbytes

    while not ended.wait(EVERY_S):
        with suppress(OSError):  # files come and go
            stats = [entry.stat() for entry in os.scandir(store)]
            written = sum(min(512 * getattr(s, "st_blocks", s.st_size // 512), s.st_size) for s in stats)
            _say(f"converted {format_nbytes(written)} of {format_nbytes(sum(s.st_size for s in stats))}")


def _add_verify(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "verify", _verify, "check a store: files and sizes, or every byte of it")
    command.add_argument("path", metavar="STORE", help="folder of the store")
    command.add_argument("--full", action="store_true", help="also the SHA-256 of every tensor")


def _verify(args: argparse.Namespace) -> int:
    """Exit code 0 for a sound store, 1 for a damaged one, 2 for what is no store at all."""
    arguments.model(args.path)
    _quiet_transformers()
    from mixoff.store import verify
    from mixoff.store.source import is_store
    from mixoff.units import format_nbytes

    if not is_store(args.path):
        raise CheckpointError(f"{args.path} is no store: make one with `mixoff convert`")
    try:
        report = {"ok": True} | verify.verify(args.path, args.full)
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
    from mixoff.commands import bench

    command = _add_command(
        commands, "bench", _bench, "tokens/s of a store or shape, or of the bundled model, beside this machine's limits"
    )
    bench.add_options(command)


def _bench(args: argparse.Namespace) -> int:
    from mixoff.commands import bench as command

    command.check(args)
    _quiet_transformers()
    report = command.run(args)
    print(json.dumps(report.to_dict()) if args.json else report)
    return 0


def _add_trace(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "trace", _trace, "record which experts a model asks for while it generates")
    command.add_argument("path", metavar="PATH", help="folder of a store or checkpoint, bundled model, or Hub id")
    command.add_argument("--prompt-file", required=True, metavar="FILE", help="text to continue")
    _add_tokens(command, 64)
    command.add_argument("--out", required=True, metavar="FILE", help="the trace to write, .npz")
    help_text = "auto, none, or next-router, whose guesses the trace then holds (auto)"
    command.add_argument("--prefetch", type=PREFETCH, default="auto", help=help_text)
    _add_budget(command, "auto")


def _trace(args: argparse.Namespace) -> int:
    out, prompt = args.out if os.path.splitext(args.out)[1] else f"{args.out}.npz", _read_text(args.prompt_file)
    arguments.new_file(out, ".npz")
    arguments.model(args.path)
    with _starting(f"loading {printable(args.path)}"):
        _quiet_transformers()
        from mixoff.loading import load
        from mixoff.text import generation
        from mixoff.units import format_nbytes

    with load.load(args.path, args.fast_bytes, prefetch=args.prefetch) as model:
        tokenizer = generation.load_tokenizer(model.mixoff.source.folder)
        with model.mixoff.trace() as recorder:
            generation.generate(model, tokenizer, prompt, args.max_new_tokens)
    trace = recorder.trace
    out = trace.save(out)
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
    except ValueError as error:  # a name that no file can have
        raise MixoffError(f"cannot read {path!r} as text: {error}") from error


def _add_simulate(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "simulate", _simulate, "count the hits and misses that a trace would have")
    command.add_argument(
        "trace", metavar="TRACE", help="file of `mixoff trace`, .csv or .jsonl, or a bundled one: tiny-mixtral/novel"
    )
    command.add_argument(
        "--policy",
        type=arguments.simulated_policy,
        default="lru",
        help="lru, fifo, lfu, lfuda, lfru, random, least-stale, half-life, static, belady, or all, in a table (lru)",
    )
    slots = arguments.whole("slots", "give a whole number, of each layer")
    command.add_argument("--slots", type=slots, default=4, metavar="S", help="of each layer (4)")
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
    from mixoff.trace import simulate
    from mixoff.trace.trace import Trace
    from mixoff.units import parse_nbytes

    nbytes, ahead = (x if x is None else parse_nbytes(x) for x in (args.expert_nbytes, args.prefetch_nbytes))
    trace, how = Trace.load(args.trace), {"prefetch": args.prefetch, "prefetch_nbytes": ahead}
    if args.policy == "all":
        table = simulate.compare(trace, args.slots, args.scope, nbytes, **how)
        print(json.dumps(table.to_dict()) if args.json else table)
        return 0
    result = simulate.simulate(trace, args.policy, args.slots, args.scope, nbytes, **how)
    print(json.dumps(result.to_dict()) if args.json else f"{result} (modelled)")
    return 0


def _add_plan(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "plan", _plan, "what a model needs, what lies where, does it fit, and how fast")
    command.add_argument("source", metavar="SOURCE", help="model folder, config.json, bundled model, or Hub id")
    command.add_argument(
        "--fast", type=arguments.size, metavar="SIZE", help="the whole fast memory, as in 14.75GiB (the hardware's)"
    )
    command.add_argument(
        "--ram", type=arguments.size, metavar="SIZE", help="RAM that is free for experts, as in 12.7GB (the hardware's)"
    )
    command.add_argument(
        "--disk", type=arguments.size, metavar="SIZE", help="disk that is free for the store (the hardware's)"
    )
    tokens = arguments.whole("context", "plan for at least one token")
    command.add_argument("--context", type=tokens, default=4096, metavar="N", help="tokens in the KV cache (4096)")
    batch = arguments.whole("batch", "plan for at least one sequence")
    command.add_argument("--batch", type=batch, default=1, metavar="N", help="sequences at once (1)")
    scheme = arguments.choice("no scheme", arguments.SCHEMES)
    command.add_argument("--scheme", type=scheme, help=f"quantization: {SCHEMES} (mixed, or what a store is in)")
    names = "t4, rtx-3060, ..., or 'here', measured once (t4)"
    command.add_argument("--hardware", type=arguments.machine, metavar="NAME", help=names)
    command.add_argument("--refresh", action="store_true", help="with --hardware here: measure this machine again")


def _plan(args: argparse.Namespace) -> int:
    source = arguments.plan_source(args.source)
    with _starting(f"planning {printable(source)}"):
        _quiet_transformers()
        from mixoff.planning import planner, probe

    if args.refresh:
        probe.probe(cached=False)
    sizes = args.fast, args.ram, args.disk
    how = {"context": args.context, "batch": args.batch, "scheme": args.scheme, "hardware": args.hardware}
    plan = planner.plan(source, *sizes, **how)
    print(plan.to_json() if args.json else f"{_planned_for(args, plan)}\n{plan}")
    return 0


def _planned_for(args: argparse.Namespace, plan: object) -> str:
    """What is planned, and how to ask for what `run` and `convert` take by default."""
    other = [] if args.hardware or args.fast else ["--hardware here plans for this machine"]
    other += [] if args.scheme or plan.scheme == "none" else ["--scheme none for 16 bits, as run and convert have them"]
    text = f"{'a plan':<12} for {plan.hardware.name}, with experts as {plan.scheme}"
    return f"{text} ({', '.join(other)})" if other else text


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    command = _add_command(commands, "doctor", _doctor, "versions, memory, bandwidths, and what will work here")
    command.add_argument("--refresh", action="store_true", help="measure bandwidths again")


def _doctor(args: argparse.Namespace) -> int:
    with _starting("measuring this machine"):
        _quiet_transformers()
        from mixoff.bench import doctor

        checkup = doctor.examine(cached=not args.refresh)
    print(checkup.to_json() if args.json else checkup)
    return 0

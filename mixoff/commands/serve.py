"""`mixoff serve`: a model behind OpenAI's endpoints, for any client that speaks them, with a page to look at."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from mixoff.commands import arguments, opened, options
from mixoff.errors import MixoffError, one_line
from mixoff.serving import listen

if TYPE_CHECKING:
    from mixoff.serving.served import Served
    from mixoff.serving.server import Limits

HELP = "serve a model over HTTP, with OpenAI's endpoints"
KEY = "MIXOFF_API_KEY"
BATCHERS = ("rows", "paged")  # as in serving.server, where torch is imported


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add, choice, whole, real = parser.add_argument, arguments.choice, arguments.whole, arguments.real
    add("path", metavar="MODEL", help=options.PATH)
    options.fast_bytes(add)
    options.scheme(add, "quantize a plain checkpoint first, and keep the result: SCHEMES")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every network of this machine")
    port = whole("port", "give a port from 0, which is any free one, to 65535", 0, 65535)
    add("--port", type=port, default=8080, help="port to listen on")
    add("--name", type=arguments.words, help="name of the model in requests (default the end of MODEL)")
    add(
        "--api-key",
        type=arguments.words,
        metavar="KEY",
        help=f"key that requests must bring (default the variable {KEY}, if it is set)",
    )
    text = "how answers are computed together: rows works for every family, paged bounds the memory of long ones"
    add("--batcher", type=choice("batcher", BATCHERS), default="rows", help=text)
    rows = whole("parallel", "give a whole number from 1 to 256", 1, 256)
    add("--parallel", type=rows, default=8, metavar="N", help="answers that are computed together")
    waiting = whole("max_queue", "give a whole number of at least 0", 0)
    add("--max-queue", type=waiting, default=64, metavar="N", help="answers that may wait; more are refused with 429")
    tokens = whole("kv_tokens", "give at least 64 tokens", 64)
    text = "tokens whose keys and values the paged batcher holds (default N contexts)"
    add("--kv-tokens", type=tokens, default=0, metavar="T", help=text)
    text = "largest number of tokens, prompt and answer together (default 4096, or the model's own if smaller)"
    add("--context", type=whole("context", "give at least two tokens", 2), metavar="N", help=text)
    add("--max-body", type=arguments.size, default="4MiB", metavar="SIZE", help="largest body of a request")
    grace = real("grace", "give seconds, from 0 to 3600", 0, 3600)
    add("--grace", type=grace, default=30.0, metavar="S", help="seconds for running answers to finish when told to end")
    options.prefetch(add)
    options.io(add)
    text = "bytes of expert copies in RAM, between fast tier and disk (default none)"
    add("--ram-bytes", type=arguments.size, metavar="SIZE", help=text)
    add("--device", type=arguments.device, default="auto", help="auto, cpu, cuda or cuda:N; auto prefers a GPU")
    dtype = choice("dtype", arguments.DTYPES, arguments.SHORT)
    add("--dtype", type=dtype, default="auto", help="dtype of computation: auto, float32, bfloat16 or float16")
    options.decode(add)
    options.threads(add, "threads that compute (default all cores)")


def main(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    arguments.model(args.path)
    key = args.api_key or os.environ.get(KEY) or None
    _check_extra()
    listening = listen.bind(args.host, args.port)
    with opened.opened(args) as ready:
        from mixoff.serving import server
        from mixoff.serving.served import Served

        name = args.name or os.path.basename(os.path.normpath(args.path))
        served = Served(ready.model, ready.tokenizer, name, args.context or 0)
        server.serve(
            served,
            listening,
            batcher=args.batcher,
            api_key=key,
            limits=_limits(args),
            on_ready=lambda port: _say(args, served, port, key),
        )
    return 0


def _check_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        reason = one_line(error)
        raise MixoffError(f"serving needs more packages ({reason}): pip install 'mixoff[serve]'") from error


def _limits(args: argparse.Namespace) -> Limits:
    from mixoff.serving.server import Limits
    from mixoff.units import parse_nbytes

    return Limits(
        rows=args.parallel,
        waiting=args.max_queue,
        kv_tokens=args.kv_tokens,
        body_nbytes=parse_nbytes(args.max_body),
        grace_s=args.grace,
    )


def _say(args: argparse.Namespace, served: Served, port: int, key: str | None) -> None:
    """One line once requests are taken, or one JSON object."""
    host = f"[{args.host}]" if ":" in args.host else args.host
    url = f"http://{host}:{port}"
    if args.json:
        ready = {"url": url, "api": f"{url}/v1", "model": served.name, "context": served.context, "pid": os.getpid()}
        print(json.dumps(ready), flush=True)
        return
    print(f"{served.name} is served at {url}/v1, with a page at {url}; Ctrl-C ends it", flush=True)
    if args.host not in ("127.0.0.1", "localhost", "::1") and key is None:
        print(f"mixoff: anybody who reaches {url} can use it: set --api-key or {KEY}", file=sys.stderr, flush=True)

"""`mixoff run`: generate text, which is all of standard output; figures go to standard error."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from mixoff.commands import arguments, options, terminal
from mixoff.errors import MixoffError, one_line, printable

if TYPE_CHECKING:
    from mixoff.text.generation import Generation

HELP = "generate text from a store, or from a plain checkpoint folder"


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add, choice, whole, real = parser.add_argument, arguments.choice, arguments.whole, arguments.real
    add("path", metavar="PATH", help=options.PATH)
    add("--prompt", type=arguments.words, help="text to continue; - or none reads it from standard input")
    add("--system", type=arguments.words, metavar="TEXT", help="system message; the prompt then opens a chat")
    options.max_new_tokens(add, 64)
    options.fast_bytes(add)
    options.scheme(add, "quantize a plain checkpoint first, and keep the result: SCHEMES")
    text = "pools of slots: 'layer', one per MoE layer, or 'global', one for all layers"
    add("--scope", type=choice("scope", arguments.SCOPES), default="layer", help=text)
    add("--policy", type=arguments.policy, default="lru", help="policy that chooses the expert to evict")
    text = "bytes of expert copies in RAM, between fast tier and disk (default none)"
    add("--ram-bytes", type=arguments.size, metavar="SIZE", help=text)
    options.prefetch(add)
    options.io(add)
    add("--device", type=arguments.device, default="auto", help="auto, cpu, cuda or cuda:N; auto prefers a GPU")
    dtype = choice("dtype", arguments.DTYPES, arguments.SHORT)
    add("--dtype", type=dtype, default="auto", help="dtype of computation: auto, float32, bfloat16 or float16")
    text = "largest number of tokens, prompt and new ones together (default the model's)"
    add("--context", type=whole("context", "give at least two tokens", 2), metavar="N", help=text)
    options.threads(add, "threads that compute (default all cores)")
    temperature = real("temperature", "give 0, which is greedy, or a positive number")
    add("--temperature", type=temperature, default=0.0, metavar="X", help="sampling temperature; 0 is greedy")
    top_p = real("top_p", "give a share above 0, up to 1", 1e-9, 1.0)
    add("--top-p", type=top_p, metavar="P", help="sample from the likeliest tokens of this total share (default all)")
    top_k = whole("top_k", "give a whole number of at least 1", 1, 2**31 - 1)
    add("--top-k", type=top_k, metavar="K", help="sample from this many likeliest tokens (default all)")
    options.seed(add)
    add("--stop", type=arguments.words, action="append", metavar="TEXT", help="text to end after; may be repeated")


def main(args: argparse.Namespace) -> int:
    """Generate, and print text or JSON."""
    arguments.model(args.path)
    prompt, start = _prompt(args.prompt), time.perf_counter()
    with terminal.starting(f"loading {args.path}"):
        model, tokenizer = _load(args)
    load_s = time.perf_counter() - start
    with model:
        from mixoff.loading import warmup

        compile_s = warmup.compile_for(model, terminal.say)
        result = _generate(args, model, tokenizer, prompt)
        info, device = model.mixoff.info(), str(model.device)
    if args.json:
        report = {
            "text": result.text,
            "token_ids": result.token_ids,
            "tokens_per_s": result.tokens_per_s,
            **info.to_dict(),
            "slots": info.capacity,
            "device": device,
            "load_s": load_s,
            "compile_s": compile_s,
            "first_token_s": result.first_s,
            "new_tokens": len(result.token_ids),
            "prompt_tokens": result.prompt_tokens,
            "prompt_tokens_per_s": result.prompt_tokens_per_s,
        }
        print(json.dumps(report))
        return 0
    print(flush=True)
    prompt_text = f"prompt of {result.prompt_tokens} at {result.prompt_tokens_per_s:.1f} tokens/s"
    speeds = f"{len(result.token_ids)} new at {result.tokens_per_s:.1f} tokens/s (measured) on {device}"
    times = f"{result.first_s:.2f} s to the first, loaded in {load_s:.1f} s"
    print(f"{prompt_text}, {speeds}; {times}; {info}", file=sys.stderr)
    return 0


def _prompt(text: str | None) -> str:
    """The prompt, from standard input if it is `-`, or if it is not given and standard input is not a terminal."""
    if text not in (None, "-"):
        return text
    if text is None and sys.stdin.isatty():
        raise MixoffError("the following arguments are required: --prompt (or pipe the prompt in)")
    try:
        raw = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
        return raw.decode().removesuffix("\n")
    except (OSError, ValueError) as error:
        raise MixoffError(f"cannot read the prompt from standard input ({one_line(error)}): give --prompt") from error


def _load(args: argparse.Namespace) -> tuple:
    """The model and its tokenizer."""
    import torch

    from mixoff.loading import load
    from mixoff.text import generation

    if args.threads:
        torch.set_num_threads(args.threads)
    names = ("scheme", "policy", "scope", "dtype", "ram_bytes", "prefetch", "io", "device")
    settings = {name: getattr(args, name) for name in names} | ({"context": args.context} if args.context else {})
    model = load.load(args.path, args.fast_bytes, **settings)
    try:
        return model, generation.load_tokenizer(model.mixoff.source.folder)
    except BaseException:
        model.mixoff.close()
        raise


def _generate(args: argparse.Namespace, model: Any, tokenizer: Any, prompt: str) -> Generation:
    from mixoff.text import chat, generation

    sampling = {name: getattr(args, name) for name in ("temperature", "seed", "top_p", "top_k", "stop")}
    sampling["on_text"] = None if args.json else _show
    if args.system is None:
        return generation.generate(model, tokenizer, prompt, args.max_new_tokens, context=args.context, **sampling)
    messages = [{"role": "system", "content": args.system}]
    return chat.Chat(model, tokenizer, messages, args.context).ask(prompt, args.max_new_tokens, **sampling)


def _show(piece: str) -> None:
    """Print a piece of the model's text, in a terminal without control characters."""
    print(printable(piece, "\n\t") if sys.stdout.isatty() else piece, end="", flush=True)

"""`mixoff run`: generate text, which is all of standard output; figures go to standard error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from mixoff.commands import arguments, lines, opened, options, terminal
from mixoff.errors import MixoffError, one_line
from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from mixoff.cache.events import CacheInfo
    from mixoff.text.generation import Generation

HELP = "generate text from a store, or from a plain checkpoint folder"


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("path", metavar="PATH", help=options.PATH)
    add("--prompt", type=arguments.words, help="question or text to continue; - or none reads it from standard input")
    add("--prompt-file", metavar="FILE", help="file with the prompt")
    add("--system", type=arguments.words, metavar="TEXT", help="system message; the prompt then opens a chat")
    add("--raw", action="store_true", help="continue the prompt itself, without the model's chat template")
    options.max_new_tokens(add, 64)
    options.loading(add)
    options.sampling(add, 0.0)


def main(args: argparse.Namespace) -> int:
    """Generate, and print text or JSON."""
    if args.raw and args.system is not None:
        raise MixoffError("--raw leaves out the chat template, and with it --system: give one of the two")
    arguments.model(args.path)
    prompt = _prompt(args)
    with opened.opened(args) as ready:
        ranks, device = ready.model.mixoff.ranks, str(ready.model.device)
        silent = bool(args.json or ranks.rank)  # the first rank tells
        show, end = (None, None) if silent else lines.shown()
        result = _generate(args, ready, prompt, show)
        infos = ranks.gathered(ready.model.mixoff.info())
    if ranks.rank:
        return 0
    info, *others = infos
    if args.json:
        shared = {"ranks": [each.to_dict() for each in infos]} if others else {}
        print(json.dumps(_report(result, info, ready) | {"device": device} | shared))
        return 0
    if end:
        end()
    prompt_text = f"prompt of {result.prompt_tokens} at {result.prompt_tokens_per_s:.1f} tokens/s"
    speeds = f"{len(result.token_ids)} new at {result.tokens_per_s:.1f} tokens/s (measured) on {device}"
    times = f"{result.first_s:.2f} s to the first, loaded in {ready.load_s:.1f} s"
    print(terminal.fold(f"{prompt_text}, {speeds}; {times}{_counts(infos)}", sys.stderr), file=sys.stderr)
    return 0


def _counts(infos: list[CacheInfo]) -> str:
    """The counters; those of several ranks one by one, and their sum."""
    if len(infos) == 1:
        return f"; {infos[0]}"
    hits, misses, moved = (sum(getattr(info, name) for info in infos) for name in ("hits", "misses", "bytes_moved"))
    told = [f"rank {rank}: {info}" for rank, info in enumerate(infos)]
    return "\n".join(["", *told, f"{len(infos)} ranks: {hits} hits, {misses} misses; {format_nbytes(moved)} moved"])


def _report(result: Generation, info: CacheInfo, ready: opened.Opened) -> dict:
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "tokens_per_s": result.tokens_per_s,
        **info.to_dict(),
        "slots": info.capacity,
        "load_s": ready.load_s,
        "compile_s": ready.compile_s,
        "first_token_s": result.first_s,
        "new_tokens": len(result.token_ids),
        "prompt_tokens": result.prompt_tokens,
        "prompt_tokens_per_s": result.prompt_tokens_per_s,
    }


def _prompt(args: argparse.Namespace) -> str:
    """The prompt, from standard input if it is `-`, or if it is not given and standard input is not a terminal."""
    if args.prompt_file is not None:
        if args.prompt is not None:
            raise MixoffError("--prompt and --prompt-file both give a prompt: leave one of them out")
        return arguments.text_of(args.prompt_file).removesuffix("\n")
    if args.prompt not in (None, "-"):
        return args.prompt
    if args.prompt is None and sys.stdin.isatty():
        raise MixoffError("the following arguments are required: --prompt (or pipe the prompt in)")
    try:
        raw = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
        return raw.decode().removesuffix("\n")
    except (OSError, ValueError) as error:
        raise MixoffError(f"cannot read the prompt from standard input ({one_line(error)}): give --prompt") from error


def _generate(
    args: argparse.Namespace, ready: opened.Opened, prompt: str, show: Callable[[str], object] | None
) -> Generation:
    """The answer to the prompt where the model has a chat template or `--system` is given, else its continuation."""
    from mixoff.text import chat, generation

    asked = opened.sampling(args) | {"context": args.context, "on_text": show}
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    talk = chat.Chat(ready.model, ready.tokenizer, system, args.context)
    if args.raw or not (system or talk.own_template):
        return generation.generate(ready.model, ready.tokenizer, prompt, args.max_new_tokens, **asked)
    return talk.ask(prompt, args.max_new_tokens, **asked)

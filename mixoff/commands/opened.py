"""A model and its tokenizer, as `options.loading` describes them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixoff.checkpoints.names import parse
from mixoff.commands import convert, options, terminal
from mixoff.errors import MixoffError
from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS = ("scheme", "policy", "scope", "dtype", "ram_bytes", "prefetch", "io", "device", "kv_bits", "decode")


@dataclass
class Opened:
    """A model that is ready to write, and the seconds that this took.

    load_s: seconds for reading it
    compile_s: seconds for compiling its kernels, which are needed once per machine
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    load_s: float
    compile_s: float


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Opened]:
    """The model at `args.path`, closed at the end. Raises MixoffError."""
    start = time.perf_counter()
    with terminal.starting(f"loading {args.path}"), terminal.ticking(lambda: _progress(args)):
        model, tokenizer = _load(args)
    load_s = time.perf_counter() - start
    with model:
        from mixoff.loading import warmup

        yield Opened(model, tokenizer, load_s, warmup.compile_for(model, terminal.say))


def _load(args: argparse.Namespace) -> tuple:
    import torch

    from mixoff.loading import load
    from mixoff.runtime import ranks
    from mixoff.text import generation

    if shared := ranks.launched():
        _check_shareable(args)

    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name in SETTINGS}  # some commands have fewer
    settings |= {"context": args.context} if args.context else {}
    model = load.load(args.path, args.fast_bytes, shard=shared, **settings)
    try:
        return model, generation.load_tokenizer(model.mixoff.source.folder)
    except BaseException:
        model.mixoff.close()
        raise


def _check_shareable(args: argparse.Namespace) -> None:
    """Refuse, under torchrun, what cannot be the same in every process."""
    if args.command != "run":
        raise MixoffError(f"torchrun starts several processes, and {args.command} is for one: only run shares experts")
    if args.prompt in (None, "-") and args.prompt_file is None:
        raise MixoffError("several processes cannot read one standard input: give --prompt or --prompt-file")


def _progress(args: argparse.Namespace) -> str | None:
    """What takes long before a model is loaded: a download, or a conversion where no bar shows it."""
    from mixoff.store import inventory, kept

    if args.scheme and not sys.stderr.isatty():
        partial = max(kept.stores().glob("*.partial/store"), key=lambda path: path.stat().st_mtime, default=None)
        if partial is not None:
            return convert.converted(str(partial))
    if (model := parse(args.path)) is None:
        return None
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{model.repo.replace('/', '--')}", "blobs")
    return f"fetched {format_nbytes(nbytes)} of {model}" if (nbytes := inventory.nbytes_of(folder)) else None


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What `options.sampling` read, as arguments of `generation.generate`."""
    return {name: getattr(args, name) for name in options.SAMPLING}

"""`mixoff demo`: the bundled model writes under a byte budget, and the terminal shows which experts move."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from mixoff.commands import arguments, options, terminal

if TYPE_CHECKING:
    from rich.table import Table

    from mixoff.cache.events import CacheInfo
    from mixoff.text.generation import Generation

HELP = "watch the bundled model write with most of its experts outside the fast tier"
PROMPT = "It was a fine morning in the spring, and Elizabeth"


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    options.fast_bytes(add, "6MB")
    add("--prompt", type=arguments.words, help=f"text to continue (default {PROMPT!r})")
    options.max_new_tokens(add, 160)
    options.seed(add, 3)
    add("--svg", metavar="FILE", help="save a picture of the last screen")


def main(args: argparse.Namespace) -> int:
    """Show the demo; exit code 1 if its tokens differ from those of plain transformers."""
    if args.svg:
        arguments.new_file(args.svg)
    with terminal.starting("loading tiny-mixtral"):
        from mixoff.commands import grid  # noqa: F401

    return run(args.fast_bytes, args.prompt or PROMPT, args.max_new_tokens, args.seed, args.svg, as_json=args.json)


def run(
    fast_bytes: str = "6MB",
    prompt: str = PROMPT,
    max_new_tokens: int = 160,
    seed: int = 3,
    svg: str | None = None,
    as_json: bool = False,
) -> int:
    """Generate under `fast_bytes`, then in plain transformers with all experts resident; 0 if the tokens are equal."""
    import torch
    from rich.console import Console

    from mixoff import models
    from mixoff.bench.budgets import resident_model
    from mixoff.commands import grid
    from mixoff.loading import load
    from mixoff.text import generation

    torch.set_num_threads(1)  # the products of the bundled model are too small to share
    folder = models.path()
    tokenizer, console = generation.load_tokenizer(folder), Console(quiet=as_json)
    sampling: dict[str, Any] = {"temperature": 0.7, "seed": seed}
    with load.load(folder, fast_bytes=fast_bytes) as model:
        experts = grid.Grid(model.mixoff)
        pieces: list[str] = []
        model.mixoff.on_event(experts.note)
        with grid.Display(console, lambda: grid.screen(experts, prompt, "".join(pieces))) as show:

            def on_text(piece: str) -> None:
                pieces.append(piece)
                show()

            result = generation.generate(model, tokenizer, prompt, max_new_tokens, on_text=on_text, **sampling)
        if svg:
            grid.save_svg(grid.screen(experts, prompt, "".join(pieces)), svg)
        info = model.mixoff.info()
    reference = generation.generate(resident_model(), tokenizer, prompt, max_new_tokens, **sampling)
    same = result.token_ids == reference.token_ids
    if as_json:
        print(json.dumps({"text": result.text, "tokens_per_s": result.tokens_per_s, "equal": same} | info.to_dict()))
    console.print(_summary(result, reference, info, same), highlight=False)
    return 0 if same else 1


def _summary(result: Generation, reference: Generation, info: CacheInfo, same: bool) -> Table:
    from rich.table import Table

    from mixoff.units import format_nbytes

    verdict = "equal, token for token" if same else "DIFFERENT: please report this"
    rows = {
        "tokens/s": f"{result.tokens_per_s:.1f} measured; all resident in transformers {reference.tokens_per_s:.1f}",
        "hit rate": f"{info.hit_rate or 0:.3f} while decoding: {info.hits} hits, {info.misses} misses",
        "moved": f"{format_nbytes(info.bytes_moved)} from the slow tier ({info.bytes_moved:,} bytes)",
        "fast tier": f"{format_nbytes(info.fast_bytes_peak)} at its peak ({info.fast_bytes_peak:,} bytes of "
        f"{info.fast_bytes:,}): {info.capacity} slots for {info.num_experts} experts",
        "exactness": f"{len(result.token_ids)} tokens against the fully resident model: {verdict}",
    }
    table = Table.grid(padding=(0, 1))
    for name, text in rows.items():
        table.add_row(name, text)
    return table

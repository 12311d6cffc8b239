"""The demo: a trained Mixture-of-Experts model writes, and the terminal shows which experts move.

Letters: **L** layers, **E** experts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from mixoff import models
from mixoff.bench.budgets import resident_model
from mixoff.loading import load
from mixoff.runtime import runtime
from mixoff.text import generation
from mixoff.units import format_nbytes

PROMPT = "It was a fine morning in the spring, and Elizabeth"
WIDTH, BAR = 92, 26  # columns of the picture, and of a layer's bar
# marks differ by letter as well as by colour (Okabe and Ito's palette, which colour-blind readers can tell apart)
MARKS = {
    "slow": ("·", "grey50"),
    "resident": ("■", "#56B4E9"),
    "hit": ("H", "bold #009E73"),
    "miss": ("M", "bold #D55E00"),
}
LABELS = {"hit": "hit", "miss": "fetched", "resident": "in the fast tier", "slow": "in the slow tier"}


@dataclass
class Grid:
    """What each expert is now, and did for the newest token, (L, E); and each layer's hits so far, prompt left out."""

    runtime: runtime.Runtime
    token: int = 0
    last: dict[tuple[int, int], str] = field(default_factory=dict)
    counts: dict[int, list[int]] = field(default_factory=dict)  # layer: [hits, requests] of decoding

    def note(self, event: runtime.Event) -> None:
        """Take in one event of the runtime."""
        if event.token != self.token:
            self.token, self.last = event.token, {}
        if event.kind not in ("hit", "miss"):
            return
        self.last[event.layer, event.expert] = event.kind
        if event.phase == "decode":
            count = self.counts.setdefault(event.layer, [0, 0])
            count[0] += event.kind == "hit"
            count[1] += 1

    def render(self) -> Text:
        """One row a layer: one mark an expert, then the share of requests that were hits."""
        resident, rows = self.runtime.resident(), Text()
        for site in self.runtime.source.sites:
            rows.append(f"layer {site.layer:<2} ", "dim")
            for expert in range(site.num_experts):
                at = (site.layer, expert)
                mark, style = MARKS[self.last.get(at) or ("resident" if at in resident else "slow")]
                rows.append(f"  {mark}", style)
            rows.append_text(self._bar(site.layer))
        for name, label in LABELS.items():
            rows.append(f"{MARKS[name][0]} ", MARKS[name][1]).append(f"{label}   ", "dim")
        return rows

    def _bar(self, layer: int) -> Text:
        hits, requests = self.counts.get(layer, (0, 0))
        share = hits / requests if requests else 0.0
        full = round(share * BAR)
        bar = Text("     ").append("━" * full, MARKS["hit"][1]).append("╌" * (BAR - full), MARKS["miss"][1])
        return bar.append(f"  {share:.2f} hits\n", "dim")


def screen(grid: Grid, prompt: str, text: str) -> Group:
    """Text above, experts below, figures under them."""
    info = grid.runtime.info()
    rate = 0.0 if info.hit_rate is None else info.hit_rate
    moved, fast = format_nbytes(info.bytes_moved), format_nbytes(info.fast_bytes_peak)
    figures = f"hit rate {rate:.2f} · {moved} moved · fast tier {fast}"
    title = f"{info.capacity} slots for {info.num_experts} experts"
    return Group(
        Panel(Text(prompt, "bold").append(text, "not bold"), title="mixoff demo", width=WIDTH),
        Panel(grid.render(), title=title, subtitle=figures, width=WIDTH),
    )


def run(
    fast_bytes: str = "6MB",
    prompt: str = PROMPT,
    max_new_tokens: int = 160,
    seed: int = 3,
    svg: str | None = None,
    as_json: bool = False,
) -> int:
    """Generate under `fast_bytes`, then with all experts resident in plain transformers; 0 when the tokens agree."""
    torch.set_num_threads(1)  # the bundled model's products are too small to share
    folder = models.path()
    tokenizer = generation.load_tokenizer(folder)
    console = Console(quiet=as_json)
    with load.load(folder, fast_bytes=fast_bytes) as model:
        grid, written = Grid(model.mixoff), [""]
        model.mixoff.on_event(grid.note)
        with _display(console, lambda: screen(grid, prompt, written[0])) as show:

            def on_text(piece: str) -> None:
                written[0] += piece
                show()

            result = generation.generate(
                model, tokenizer, prompt, max_new_tokens, temperature=0.7, seed=seed, on_text=on_text
            )
        if svg:
            save_svg(screen(grid, prompt, written[0]), svg)
        info = model.mixoff.info()
    reference = generation.generate(resident_model(), tokenizer, prompt, max_new_tokens, temperature=0.7, seed=seed)
    same = result.token_ids == reference.token_ids
    if as_json:
        print(json.dumps({"text": result.text, "tokens_per_s": result.tokens_per_s, "equal": same} | info.to_dict()))
    console.print(_summary(result, reference, info, same), highlight=False)
    return 0 if same else 1


class _display:
    """Redraws a picture in a terminal; elsewhere prints it once, at the end."""

    def __init__(self, console: Console, picture: Callable[[], Group]) -> None:
        self.console, self.picture = console, picture
        self.live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None

    def __enter__(self) -> Callable[[], None]:
        if self.live is None:
            return lambda: None
        self.live.start()
        return lambda: self.live.update(self.picture(), refresh=True)

    def __exit__(self, *exc: object) -> None:
        if self.live is None:
            self.console.print(self.picture())
        else:
            self.live.update(self.picture(), refresh=True)
            self.live.stop()
        sys.stdout.flush()


def _summary(
    result: generation.Generation, reference: generation.Generation, info: runtime.CacheInfo, same: bool
) -> str:
    verdict = "equal, token for token" if same else "DIFFERENT: please report this"
    rows = {
        "tokens/s": f"{result.tokens_per_s:.1f} measured; all resident in transformers {reference.tokens_per_s:.1f}",
        "hit rate": f"{info.hit_rate or 0:.3f} while decoding: {info.hits} hits, {info.misses} misses",
        "moved": f"{format_nbytes(info.bytes_moved)} from the slow tier ({info.bytes_moved:,} bytes)",
        "fast tier": f"{format_nbytes(info.fast_bytes_peak)} at its peak ({info.fast_bytes_peak:,} bytes of "
        f"{info.fast_bytes:,}): {info.capacity} slots for {info.num_experts} experts",
        "exactness": f"{len(result.token_ids)} tokens against the fully resident model: {verdict}",
    }
    return "\n".join(f"{name:<10}{text}" for name, text in rows.items())


# rich's own template loads a font from the web and draws a window's frame; a README's picture needs neither
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<title>mixoff demo: text above, the grid of experts below</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}
</defs>
<rect fill="#0c1021" x="0" y="0" width="{width}" height="{height}" rx="8" />
<g transform="translate({terminal_x}, 20)" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g>
</svg>
"""


def save_svg(picture: Group, path: str) -> None:
    """Write a picture of the screen as an SVG that needs no font or file from elsewhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(picture)
        console.save_svg(path, code_format=SVG, unique_id="mixoff")

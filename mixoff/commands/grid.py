"""The screen of `mixoff demo`: the text, and a grid that shows which experts move.

Letters: **L** layers, **E** experts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from mixoff.cache.events import Event
from mixoff.runtime.runtime import Runtime
from mixoff.units import format_nbytes

WIDTH, BAR = 92, 26  # columns of the picture, and of the bar of a layer
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
    """State of each expert for the newest token, (L, E), and the hits of each layer since the prompt."""

    runtime: Runtime
    token: int = 0
    last: dict[tuple[int, int], str] = field(default_factory=dict)
    counts: dict[int, list[int]] = field(default_factory=dict)  # layer: [hits, requests] of decoding

    def note(self, event: Event) -> None:
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
        """One row per layer: one mark per expert, then the share of requests that were hits."""
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
    """The text, and below it the experts with the figures of the cache."""
    info = grid.runtime.info()
    rate = 0.0 if info.hit_rate is None else info.hit_rate
    moved, fast = format_nbytes(info.bytes_moved), format_nbytes(info.fast_bytes_peak)
    figures = f"hit rate {rate:.2f} · {moved} moved · fast tier {fast}"
    title = f"{info.capacity} slots for {info.num_experts} experts"
    return Group(
        Panel(Text(prompt, "bold").append(text, "not bold"), title="mixoff demo", width=WIDTH),
        Panel(grid.render(), title=title, subtitle=figures, width=WIDTH),
    )


class Display:
    """Redraws a picture in a terminal; elsewhere prints it once, at the end."""

    def __init__(self, console: Console, picture: Callable[[], Group]) -> None:
        self.console, self.picture = console, picture
        self.live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None

    def __enter__(self) -> Callable[[], None]:
        if (live := self.live) is None:
            return lambda: None
        live.start()
        return lambda: live.update(self.picture(), refresh=True)

    def __exit__(self, *exc: object) -> None:
        if self.live is None:
            self.console.print(self.picture())
        else:
            self.live.update(self.picture(), refresh=True)
            self.live.stop()
        sys.stdout.flush()


# rich's template loads a font from the web and draws the frame of a window; a picture in a README needs neither
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
    """Write a picture of the screen as an SVG that needs no other file or font."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(picture)
        console.save_svg(path, code_format=SVG, unique_id="mixoff")

"""Figures of the chapters: one style, a colour-blind-safe palette, and a caption that states the finding.

Categories are Okabe and Ito's hues, magnitudes are cividis; hit, miss and resident differ by letter and shade too.
Figures have no background, and every colour here is neither too light for a white page nor too dark for a black one:
a test computes a contrast of 3:1 on the pages of THEMES.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mixoff.cache.cells import AWAY, EVICTED, HIT, MISS, PREFETCHED, RESIDENT  # noqa: F401  # codes of a grid
from mixoff.cache.events import Event

# the pages on which figures are read
THEMES = {"white": "#FFFFFF", "JupyterLab, dark": "#111111", "the site, dark": "#131416", "Colab, dark": "#1E1E1E"}
# Okabe and Ito, Color Universal Design (2008); orange, sky, yellow and purple darker, for the contrast
OKABE_ITO = {
    "orange": "#C48700",
    "sky": "#3A93C8",
    "green": "#009E73",
    "yellow": "#8F8600",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#C26A9A",
}
INK = "#767676"  # of text, axes and reference lines
LINE = "#949494"  # of what is less important than they are
AREA = {"facecolor": "none", "edgecolor": LINE, "hatch": "///", "linewidth": 0}  # a region, for `fill_between`
DPI = 110
STYLE = {
    "figure.dpi": DPI,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=list(OKABE_ITO.values())),
    "image.cmap": "cividis",
    "hatch.linewidth": 0.6,
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}

# States of an expert at one token, in the order of the codes of a grid: label, letter, colour
STATES = (
    ("in the slow tier", "", "none"),
    ("resident, not asked for", "", LINE),
    ("hit", "h", OKABE_ITO["blue"]),
    ("miss", "M", OKABE_ITO["vermillion"]),
    ("prefetched", "p", OKABE_ITO["yellow"]),
    ("evicted", "x", "none"),
)


def use_style() -> None:
    """Set the style of the course for all later figures."""
    plt.rcParams.update(STYLE)


def show(fig: Figure, caption: str, alt: str | None = None) -> None:
    """Display a figure with its caption below, and close it.

    It is an HTML figure with the image inside, because JupyterLab and Colab give an image of their own no alternative
    text.

    caption: the finding with its numbers; it is the text of the output, so nbval compares it.
    alt: description of the figure for readers who cannot see it (default: the caption).
    """
    from IPython.display import display

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})  # without matplotlib's version
    plt.close(fig)
    display({"text/html": as_html(buffer.getvalue(), caption, alt or caption), "text/plain": caption}, raw=True)


def as_html(png: bytes, caption: str, alt: str) -> str:
    """A `figure` element, complete in itself."""
    image = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    below = f'<figcaption style="max-width: 46em"><em>{html.escape(caption)}</em></figcaption>'
    look = "max-width: 100%; height: auto"
    return f'<figure style="margin: 0"><img src="{image}" alt="{html.escape(alt)}" style="{look}">{below}</figure>'


def byte_bars(parts: Mapping[str, float], limits: Mapping[str, float], unit: str) -> Figure:
    """One stacked horizontal bar of `parts`, with a dashed line at each of `limits`, all in `unit`."""
    fig, ax = plt.subplots(figsize=(7.5, 2.1))
    start, hatches = 0.0, ("", "//", "..", "xx", "\\\\")
    for (name, size), colour, hatch in zip(parts.items(), OKABE_ITO.values(), hatches, strict=False):
        label = f"{name}: {size:.1f} {unit}"
        ax.barh(0, size, left=start, height=0.5, color=colour, hatch=hatch, edgecolor="white", label=label)
        start += size
    for name, size in limits.items():
        ax.axvline(size, color=INK, linestyle="--")
        ax.annotate(f"{name}: {size:.1f} {unit}", (size, 0.42), xytext=(4, 0), textcoords="offset points")
    ax.set(xlabel=unit, yticks=[], ylim=(-0.4, 0.62))
    ax.spines["left"].set_visible(False)
    fig.legend(loc="outside lower center", ncols=len(parts), frameon=False)
    return fig


def expert_grids(grids: Sequence[np.ndarray], titles: Sequence[str], columns: int = 3) -> Figure:
    """Small multiples, one grid per token: layers down, experts across, each cell one of STATES by colour and letter.

    grids: arrays (L, E) of the codes AWAY, RESIDENT, HIT, MISS, PREFETCHED and EVICTED; the legend names those used.
    """
    L, E = grids[0].shape
    rows = -(-len(grids) // columns)
    seen = [STATES[code] for code in sorted(set().union(*map(np.unique, grids)))]
    below = 0.4 if len(seen) < 5 else 0.9  # the legend takes one line or two
    size = (0.27 * E * columns + 0.6, (0.27 * L + 0.5) * rows + below)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    for ax, grid, title in zip(axes.flat, grids, titles, strict=False):
        draw_grid(ax, grid)
        ax.set_title(title, fontsize=9, loc="left")
    for ax in axes[:, 0]:
        ax.set(yticks=[0.5, L - 0.5], yticklabels=[0, L - 1], ylabel="layer")
    for ax in axes[-1]:
        ax.set(xticks=[0.5, E - 0.5], xticklabels=[0, E - 1], xlabel="expert")
    axes[0, 0].invert_yaxis()
    keys = [Patch(facecolor=colour, edgecolor=LINE, label=f"{name} {letter}") for name, letter, colour in seen]
    fig.legend(handles=keys, loc="outside lower center", ncols=len(keys) if len(keys) < 5 else 3, frameon=False)
    return fig


def draw_grid(ax: Axes, grid: np.ndarray) -> None:
    """Draw the states of one token, (L, E), into `ax`."""
    colours = ListedColormap([(0, 0, 0, 0) if colour == "none" else colour for _, _, colour in STATES])
    ax.pcolormesh(grid, cmap=colours, vmin=0, vmax=len(STATES) - 1, edgecolors=LINE, linewidth=0.5, clip_on=False)
    for (layer, expert), code in np.ndenumerate(grid):
        _, letter, colour = STATES[code]
        on = INK if colour == "none" else "white"
        ax.text(expert + 0.5, layer + 0.5, letter, ha="center", va="center", fontsize=8, color=on)
    ax.set(aspect="equal")
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)


def tiers_picture(
    shelf: Sequence[int], slots: Sequence[int], asked: int, below: Mapping[int, str] | None = None
) -> Figure:
    """The idea of a cache as a drawing: a shelf with every expert, a link, slots, and a request for the expert `asked`.

    shelf: the experts of the slow tier. slots: those in the fast tier. below: words under a resident.
    """
    fig, ax = plt.subplots(figsize=(8, 1.7))
    left = {"shelf": 0.0, "slots": 1.35 * len(shelf) + 3.4}
    for place, experts in (("shelf", shelf), ("slots", slots)):
        for i, expert in enumerate(experts):
            wanted = expert == asked
            colour = OKABE_ITO["vermillion" if wanted else "blue"] if place == "slots" or wanted else LINE
            x = left[place] + 1.35 * i
            ax.add_patch(Rectangle((x, 0), 1.15, 1.15, facecolor=colour))
            ax.text(x + 0.575, 0.575, f"{expert}", ha="center", va="center", color="white", fontsize=11)
            if place == "slots" and below and expert in below:
                ax.text(x + 0.575, -0.2, below[expert], ha="center", va="top", fontsize=8)
    end = 1.35 * len(shelf)
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 4}
    ax.annotate("", (left["slots"] - 0.2, 0.575), (end + 0.1, 0.575), arrowprops=arrow)
    ax.text((end + left["slots"]) / 2, 0.95, "link", ha="center")
    ax.text(0, 1.5, f"slow tier: all {len(shelf)} experts of a layer")
    ax.text(left["slots"], 1.5, f"fast tier: {len(slots)} slots")
    ax.text(left["slots"], 2.35, f"the router asks for expert {asked}", color=OKABE_ITO["vermillion"])
    ax.set(xlim=(-0.2, left["slots"] + 1.35 * len(slots) + 0.2), ylim=(-1, 2.9), aspect="equal")
    ax.set_axis_off()
    return fig


LANES = {  # lanes of a Gantt chart, from the top, and the kinds of event in each
    "compute": ("compute", "host"),
    "link": ("miss", "prefetch"),
    "disk": ("read",),
}
LOOKS = {  # colour and hatch of each kind
    "compute": (OKABE_ITO["blue"], ""),
    "host": (LINE, "//"),
    "miss": (OKABE_ITO["vermillion"], "xx"),
    "prefetch": (OKABE_ITO["sky"], ".."),
    "read": (OKABE_ITO["purple"], "\\\\"),
}


def gantt(events: Iterable[Event], ax: Axes | None = None, title: str = "", modelled: bool = True) -> Axes:
    """Draw the time line of a modelled step or of a runtime's events, in ms, one row per lane.

    Modelled spans have dashed outlines, measured ones solid: draw both into one `ax` to compare.
    """
    ax = ax or plt.subplots(figsize=(8, 1.8), layout="constrained")[1]
    spans = {kind: [(1e3 * e.t0, 1e3 * (e.t1 - e.t0)) for e in events if e.kind == kind] for kind in LOOKS}
    lanes = [lane for lane, kinds in LANES.items() if any(spans[kind] for kind in kinds)]
    for row, lane in enumerate(lanes):
        for kind in LANES[lane]:
            colour, hatch = LOOKS[kind]
            look = {"facecolor": colour, "hatch": hatch, "edgecolor": "black", "alpha": 0.85, "linewidth": 0.5}
            ax.broken_barh(spans[kind], (-row - 0.4, 0.8), **look, linestyle="--" if modelled else "-", label=kind)
    ax.set(yticks=[-row for row in range(len(lanes))], yticklabels=lanes, xlabel="ms", title=title)
    return ax

"""Figures of the chapters: one style, a colour-blind-safe palette, and a caption that states the finding.

Categories are Okabe and Ito's colours, magnitudes are cividis; hit, miss and resident differ by letter and shade too.
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
from matplotlib.patches import Patch

from mixoff.cache.cells import AWAY, EVICTED, HIT, MISS, PREFETCHED, RESIDENT  # noqa: F401  # codes of a grid
from mixoff.cache.events import Event

# Okabe and Ito, Color Universal Design (2008)
OKABE_ITO = {
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "black": "#000000",
}
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
}

# States of an expert at one token, in the order of the codes of a grid: label, letter, colour
STATES = (
    ("in the slow tier", "", "#FFFFFF"),
    ("resident, not asked for", "", "#D9D9D9"),
    ("hit", "h", OKABE_ITO["sky"]),
    ("miss", "M", OKABE_ITO["vermillion"]),
    ("prefetched", "p", OKABE_ITO["yellow"]),
    ("evicted", "x", "#FFFFFF"),
)
LINE = "#999999"


def use_style() -> None:
    """Set the style of the course for all later figures."""
    plt.rcParams.update(STYLE)


def show(fig: Figure, caption: str, alt: str | None = None) -> None:
    """Display a figure with its caption below, and close it.

    caption: the finding with its numbers; it is the text of the image, so nbval compares it.
    alt: description of the figure for readers who cannot see it (default: the caption).
    """
    from IPython.display import display

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})  # without matplotlib's version
    plt.close(fig)
    image = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": caption}
    display(image, raw=True, metadata={"image/png": {"alt": alt or caption}})
    below = f'<p style="max-width: 46em"><em>{html.escape(caption)}</em></p>'
    display({"text/html": below, "text/plain": caption}, raw=True)


def byte_bars(parts: Mapping[str, float], limits: Mapping[str, float], unit: str) -> Figure:
    """One stacked horizontal bar of `parts`, with a dashed line at each of `limits`, all in `unit`."""
    fig, ax = plt.subplots(figsize=(7.5, 2.1))
    start, hatches = 0.0, ("", "//", "..", "xx", "\\\\")
    for (name, size), colour, hatch in zip(parts.items(), OKABE_ITO.values(), hatches, strict=False):
        label = f"{name}: {size:.1f} {unit}"
        ax.barh(0, size, left=start, height=0.5, color=colour, hatch=hatch, edgecolor="white", label=label)
        start += size
    for name, size in limits.items():
        ax.axvline(size, color="black", linestyle="--")
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
    colours = ListedColormap([colour for _, _, colour in STATES])
    ax.pcolormesh(grid, cmap=colours, vmin=0, vmax=len(STATES) - 1, edgecolors=LINE, linewidth=0.5, clip_on=False)
    for (layer, expert), code in np.ndenumerate(grid):
        ax.text(expert + 0.5, layer + 0.5, STATES[code][1], ha="center", va="center", fontsize=8)
    ax.set(aspect="equal")
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)


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

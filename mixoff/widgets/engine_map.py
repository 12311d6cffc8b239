"""A map of machines: RAM by VRAM, marked by the best way to run a model there, for bandwidths that a reader sets.

The browser computes the map itself, by the sums of `classroom.engines`, so it works without a kernel. A test holds the
two to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import anywidget
import matplotlib.pyplot as plt
import numpy as np
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from mixoff.classroom.engines import WAYS, Machine, Workload, best
from mixoff.errors import MixoffError

HERE = Path(__file__).parent
VRAM, RAM = tuple(range(0, 34, 2)), tuple(range(4, 68, 4))  # GB, from the first cell to the last
NONE = "none"
LETTERS = {"card": "W", "split": "S", "copied": "C", "ram": "R", NONE: "-"}
PALE = {"card": "#cfe8f7", "split": "#fbe3b0", "copied": "#c9ecdf", "ram": "#eadcf1", NONE: "#eeeeee"}
DARK = "#111111"  # of letters, on every page: cells are pale on white and on black
GB = 1e9


class EngineMap(anywidget.AnyWidget):
    """Sliders for bandwidths, and a map that follows them. Raises MixoffError for an empty choice of models.

    models: workloads by name; the first is shown
    machine: bandwidths to begin with, and the memories of the marked machine
    """

    _esm = (HERE / "theme.js").read_text("utf-8") + (HERE / "engine_map.js").read_text("utf-8")
    _css = HERE / "engine_map.css"
    models = traitlets.Dict().tag(sync=True)
    machine = traitlets.Dict().tag(sync=True)
    axes = traitlets.Dict().tag(sync=True)
    ways = traitlets.Dict().tag(sync=True)

    def __init__(self, models: Mapping[str, Workload], machine: Machine) -> None:
        if not models:
            raise MixoffError("a map needs a model: give workloads by name")
        super().__init__(
            models={name: asdict(of) for name, of in models.items()},
            machine=asdict(machine),
            axes={"vram": VRAM, "ram": RAM},
            ways={way: [LETTERS[way], WAYS.get(way, "does not run"), PALE[way]] for way in PALE},
        )
        self._of, self._on = next(iter(models.values())), machine

    def figure(self) -> Figure:
        """The map of the first model, still."""
        fig, ax = plt.subplots(figsize=(5.5, 3.4))
        draw(ax, self._of, self._on)
        return fig

    def summary(self) -> str:
        """The best way on the marked machine, in words."""
        way, seconds = best(self._of, self._on)
        if way == NONE:
            return "it does not run there"
        return f"{WAYS[way]}, at most {1 / seconds:.1f} tokens/s (modelled)"

    def __repr__(self) -> str:
        return f"EngineMap({', '.join(self.models)})"


def draw(ax: Axes, of: Workload, on: Machine, dot: bool = True) -> dict[str, float]:
    """Draw the map for the bandwidths of `on`; returns the share of each way. dot: mark the memories of `on`."""
    names = list(PALE)
    cells = np.array(
        [[names.index(best(of, replace(on, vram=v * GB, ram=r * GB))[0]) for r in RAM] for v in VRAM]
    )  # (VRAM, RAM)
    ax.pcolormesh(RAM, VRAM, cells, cmap=ListedColormap(list(PALE.values())), vmin=-0.5, vmax=len(names) - 0.5)
    for i, v in enumerate(VRAM):
        for j, r in enumerate(RAM):
            if (i + j) % 2 == 0:
                ax.text(r, v, LETTERS[names[cells[i, j]]], ha="center", va="center", fontsize=7, color=DARK)
    if dot:
        ax.plot(
            min(on.ram / GB, RAM[-1]), min(on.vram / GB, VRAM[-1]), "o", color="black", markersize=9, fillstyle="none"
        )
    ax.set(xlabel="RAM, GB", ylabel="VRAM, GB", xticks=RAM[::3], yticks=VRAM[::4])
    return {name: float((cells == i).mean()) for i, name in enumerate(names)}

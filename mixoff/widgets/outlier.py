"""One weight of a group is dragged away, and the ruler of all of them follows: scale, codes and errors.

Letters: **G** weights of a group. The browser rounds as `rounded` does; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import anywidget
import matplotlib.pyplot as plt
import numpy as np
import traitlets

from mixoff.classroom import plots
from mixoff.errors import MixoffError
from mixoff.widgets import browser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BITS = (2, 3, 4)


def rounded(weights: Sequence[float], bits: int) -> tuple[np.ndarray, float]:
    """Weights (G,) rounded to the nearest of 2**bits marks from smallest to largest, and the distance of marks."""
    w = np.asarray(weights, float)
    step = float(w.max() - w.min()) / (2**bits - 1) or 1.0
    return w.min() + step * np.floor((w - w.min()) / step + 0.5), step  # (G,)


def error_of_others(weights: Sequence[float], at: int, bits: int) -> float:
    """Relative error of all weights but number `at`."""
    w, others = np.asarray(weights, float), np.arange(len(weights)) != at
    return float(np.linalg.norm((rounded(w, bits)[0] - w)[others]) / np.linalg.norm(w[others]))


class OutlierRuler(anywidget.AnyWidget):
    """Drag the largest of `weights` along the line, or move it with the slider, and see what it costs the others.

    bits: of the codes, 2 to 4. `.summary()` compares the weight where it is with three times as far out, and
    `.figure()` is a still figure. Raises MixoffError for other bits and for fewer than three weights.
    """

    _esm = browser.module("outlier")
    _css = browser.style("outlier")
    weights = traitlets.List(traitlets.Float()).tag(sync=True)
    at = traitlets.Int().tag(sync=True)  # number of the weight that can be dragged
    bits = traitlets.Int().tag(sync=True)

    def __init__(self, weights: Sequence[float], bits: int = 2) -> None:
        values = [round(float(w), 4) for w in weights]
        if bits not in BITS or len(values) < 3:
            raise MixoffError(f"{len(values)} weights in {bits} bits: give three weights or more, and 2, 3 or 4 bits")
        super().__init__(weights=values, at=int(np.abs(values).argmax()), bits=bits)

    def moved(self, factor: float) -> list[float]:
        """The weights with the outlier `factor` times as far from zero."""
        return [w * factor if i == self.at else w for i, w in enumerate(self.weights)]

    def summary(self) -> str:
        """Scale and error of the other weights, with the outlier as it is and three times as far out."""
        rows = {"as it is": self.moved(1.0), "three times as far out": self.moved(3.0)}
        parts = []
        for name, w in rows.items():
            error = error_of_others(w, self.at, self.bits)
            parts.append(f"{name}: scale {rounded(w, self.bits)[1]:.3f}, error of the others {error:.2f}")
        return f"{self.bits} bits; {'; '.join(parts)}"

    def figure(self) -> Figure:
        """Weights and marks on two lines: as they are, and with the outlier three times as far out."""
        fig, axes = plt.subplots(2, 1, figsize=(7, 2.4), sharex=True)
        for ax, factor in zip(axes, (1.0, 3.0), strict=True):
            w = np.array(self.moved(factor))
            nearest, step = rounded(w, self.bits)
            ax.vlines(w.min() + step * np.arange(2**self.bits), -0.5, 0.5, color=plots.OKABE_ITO["vermillion"])
            ax.plot(w, 0 * w, "o", color=plots.OKABE_ITO["blue"], markersize=4)
            ax.set(yticks=[], ylim=(-1, 1), title=f"scale {step:.3f}")
            ax.spines["left"].set_visible(False)
        axes[-1].set_xlabel("weight")
        return fig

    def __repr__(self) -> str:
        return f"OutlierRuler({len(self.weights)} weights, {self.bits} bits)"

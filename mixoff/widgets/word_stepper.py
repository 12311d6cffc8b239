"""Sixteen 2-bit codes in one 32-bit word, multiplied four at a time: shift, mask, multiply, add.

The order of work is that of the package's loops for CPUs (`kernels.cpu.simd`), for one output instead of eight. All
steps are computed in Python and shown by the browser, so the widget works without a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anywidget
import matplotlib.pyplot as plt
import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mixoff.classroom import plots
from mixoff.errors import MixoffError

HERE = Path(__file__).parent
BITS, CODES, BYTES = 2, 16, 4
MASK = 0x03030303


def word_of(codes: Sequence[int]) -> int:
    """The word that holds `codes`, the first one in the lowest bits.

    >>> hex(word_of([0, 1, 2, 3] * 4))
    '0xe4e4e4e4'
    """
    if len(codes) != CODES or not all(0 <= code < 2**BITS for code in codes):
        raise MixoffError(f"a word holds {CODES} codes of 0 to {2**BITS - 1}, not {list(codes)}")
    return sum(code << BITS * i for i, code in enumerate(codes))


def steps_of(word: int, activations: Sequence[int]) -> list[dict]:
    """Four steps: the shift, the shifted word, its codes, the activations that they meet, and the sum so far."""
    steps, total = [], 0
    for step in range(CODES // BYTES):
        shifted = word >> BITS * step
        codes = list((shifted & MASK).to_bytes(BYTES, "little"))
        inputs = [step + BYTES * byte for byte in range(BYTES)]
        total += sum(code * activations[i] for code, i in zip(codes, inputs, strict=True))
        steps.append({"shift": BITS * step, "shifted": shifted, "codes": codes, "inputs": inputs, "total": total})
    return steps


class WordStepper(anywidget.AnyWidget):
    """Step through the product of 16 packed `codes` (0 to 3) with 16 whole `activations`.

    >>> WordStepper([1, 2, 0, 3] * 4, [1] * 16).summary()
    'shift 0: codes 1 1 1 1, sum 4; shift 2: codes 2 2 2 2, sum 12; shift 4: codes 0 0 0 0, sum 12; \
shift 6: codes 3 3 3 3, sum 24'
    """

    _esm = (HERE / "theme.js").read_text("utf-8") + (HERE / "word_stepper.js").read_text("utf-8")
    _css = HERE / "word_stepper.css"
    word = traitlets.Int().tag(sync=True)
    activations = traitlets.List(traitlets.Int()).tag(sync=True)
    steps = traitlets.List(traitlets.Dict()).tag(sync=True)

    def __init__(self, codes: Sequence[int], activations: Sequence[int]) -> None:
        word, activations = word_of([int(code) for code in codes]), [int(a) for a in activations]
        if len(activations) != CODES:
            raise MixoffError(f"{CODES} codes meet {CODES} activations, not {len(activations)}")
        super().__init__(word=word, activations=activations, steps=steps_of(word, activations))

    def summary(self) -> str:
        """Shift, codes and sum of each step, in one line."""
        return "; ".join(
            f"shift {step['shift']}: codes {' '.join(map(str, step['codes']))}, sum {step['total']}"
            for step in self.steps
        )

    def figure(self) -> Figure:
        """All steps as a still figure: a row of 32 bits for each shift, the bits that the mask leaves in colour."""
        fig, ax = plt.subplots(figsize=(8, 2.6))
        for row, step in enumerate(self.steps):
            draw_word(ax, row, step["shifted"])
            met = " + ".join(
                f"{code}·{self.activations[i]}" for code, i in zip(step["codes"], step["inputs"], strict=True)
            )
            ax.text(33, row + 0.5, f"{met}, sum {step['total']}", va="center", fontsize=8)
        ax.set(xlim=(0, 52), ylim=(len(self.steps), -0.1), xticks=[], yticks=[0.5 + row for row in range(4)])
        ax.set_yticklabels([f"shift {step['shift']}" for step in self.steps])
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.tick_params(length=0)
        return fig

    def __repr__(self) -> str:
        return f"WordStepper({CODES} codes, sum {self.steps[-1]['total']})"


def draw_word(ax: plt.Axes, row: int, word: int) -> None:
    """Draw the bits of a word from the highest on; those under the mask are coloured."""
    for place in range(32):
        bit = 31 - place
        kept = bool(MASK >> bit & 1)
        face, on = (plots.OKABE_ITO["sky"], "white") if kept else ("none", plots.INK)
        ax.add_patch(Rectangle((place, row), 1, 0.9, facecolor=face, edgecolor=plots.LINE, linewidth=0.5))
        weight = "bold" if kept else "normal"
        ax.text(place + 0.5, row + 0.45, word >> bit & 1, ha="center", va="center", fontsize=7, weight=weight, color=on)

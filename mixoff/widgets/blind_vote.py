"""A blind vote: two continuations of a text, one of them written with fewer bits. Which one?

Sides are drawn at random, the same in every run. The widget works without a kernel.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import comb
from typing import TYPE_CHECKING

import anywidget
import matplotlib.pyplot as plt
import traitlets

from mixoff.classroom import plots
from mixoff.errors import MixoffError
from mixoff.widgets import browser

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def chance_of(right: int, rounds: int) -> float:
    """Chance that tossing a coin is right in `right` of `rounds` or more.

    >>> chance_of(5, 6)
    0.109375
    """
    return sum(comb(rounds, k) for k in range(right, rounds + 1)) / 2**rounds


class BlindVote(anywidget.AnyWidget):
    """Vote left or right in each of `rounds`: (prompt, text in full precision, text in fewer bits).

    name: what the fewer bits are called, such as "2-bit". After each vote the answer is shown, at the end what a coin
    would have done. `.summary()` says how often the two texts differ. Raises MixoffError without a round.
    """

    _esm = browser.module("blind_vote")
    _css = browser.style("blind_vote")
    name = traitlets.Unicode().tag(sync=True)
    rounds = traitlets.List(traitlets.Dict()).tag(sync=True)  # lead, left, right, and the side that has fewer bits
    chances = traitlets.List(traitlets.Float()).tag(sync=True)  # of a coin, by the number that is right

    def __init__(self, rounds: Sequence[tuple[str, str, str]], name: str = "2-bit", seed: int = 0) -> None:
        if not rounds:
            raise MixoffError("a vote needs a round: give a prompt, a text in full precision and one in fewer bits")
        n, drawn = len(rounds), []
        sides = ["left", "right"] * (n // 2 + 1)
        sides = random.Random(seed).sample(sides[:n], n)  # as often left as right, so that no side is a good guess
        for (lead, full, fewer), side in zip(rounds, sides, strict=True):
            texts = {"left": fewer, "right": full} if side == "left" else {"left": full, "right": fewer}
            drawn.append({"lead": lead, **texts, "side": side})
        super().__init__(name=name, rounds=drawn, chances=[chance_of(k, n) for k in range(n + 1)])

    def summary(self) -> str:
        """How many rounds there are, and in how many both texts are the same."""
        same = sum(each["left"] == each["right"] for each in self.rounds)
        return f"{len(self.rounds)} rounds, {self.name} against 16 bits; the same text in {same}"

    def figure(self) -> Figure:
        """What a coin does: the chance of each number of right votes, or more, as a still figure."""
        fig, ax = plt.subplots(figsize=(5, 2.4))
        ax.bar(range(len(self.chances)), self.chances, color=plots.OKABE_ITO["blue"])
        ax.set(xlabel=f"right votes of {len(self.rounds)}, or more", ylabel="chance of a coin", ylim=(0, 1))
        return fig

    def __repr__(self) -> str:
        return f"BlindVote({len(self.rounds)} rounds, {self.name})"

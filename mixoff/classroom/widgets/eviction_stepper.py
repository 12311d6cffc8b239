"""The cache of one layer, request by request: the requested expert, the slots, and the expert that a policy evicts.

Letters: **S** slots. All steps are computed in Python with the package's policies and shown by the browser, so the
widget works without a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anywidget
import matplotlib.pyplot as plt
import traitlets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mixoff.cache.cache import ExpertCache
from mixoff.cache.events import HIT as GRANTED
from mixoff.cache.policies import POLICIES
from mixoff.classroom import plots
from mixoff.errors import BudgetError, MixoffError

HERE = Path(__file__).parent
NEVER = 2**31


def belady_steps(requests: Sequence[int], slots: int) -> list[dict]:
    """Steps of the optimum, which knows the future and evicts the expert that is needed last."""
    residents: list[int | None] = [None] * slots
    steps = []
    for i, expert in enumerate(requests):
        evicted, hit = None, expert in residents
        if not hit:
            place = _farthest(residents, requests[i + 1 :])
            evicted, residents[place] = residents[place], expert
        steps.append(_step(expert, hit, evicted, residents))
    return steps


def _farthest(residents: Sequence[int | None], future: Sequence[int]) -> int:
    """Index of an empty slot, or of the resident whose next use is farthest away."""
    future = list(future)
    due = [NEVER if e is None else future.index(e) if e in future else NEVER - 1 for e in residents]
    return due.index(max(due))


def policy_steps(requests: Sequence[int], slots: int, policy: str) -> list[dict]:
    """Steps of a policy of the runtime."""
    cache = ExpertCache([slots], policy)
    residents: list[int | None] = [None] * slots
    steps = []
    for expert in requests:
        for grant in cache.access(0, [(0, expert)]):
            residents[grant.slot] = expert
            evicted = None if grant.evicted is None else grant.evicted[1]
            steps.append(_step(expert, grant.kind == GRANTED, evicted, residents))
    return steps


def steps_of(requests: Sequence[int], slots: int, policy: str) -> list[dict]:
    """The expert of each request, whether it was a hit, the evicted expert, and the slots afterwards."""
    return belady_steps(requests, slots) if policy == "belady" else policy_steps(requests, slots, policy)


def _step(expert: int, hit: bool, evicted: int | None, residents: Sequence[int | None]) -> dict:
    return {"expert": expert, "hit": bool(hit), "evicted": evicted, "slots": list(residents)}


class EvictionStepper(anywidget.AnyWidget):
    """Step through `requests`, experts of one layer in order, with `slots` slots and any of `policies`.

    The reader guesses the victim before each eviction by clicking a slot, and the widget keeps the score.

    >>> EvictionStepper([1, 2, 3, 1], slots=2).summary()
    'lru: 0 hits of 4, evicts 1 2; belady: 1 hit of 4, evicts 2'
    """

    _esm = (HERE / "theme.js").read_text("utf-8") + (HERE / "eviction_stepper.js").read_text("utf-8")
    _css = HERE / "eviction_stepper.css"
    requests = traitlets.List(traitlets.Int()).tag(sync=True)
    steps = traitlets.Dict().tag(sync=True)  # by policy

    def __init__(self, requests: Sequence[int], slots: int = 3, policies: Sequence[str] = ("lru", "belady")) -> None:
        if slots < 1:
            raise BudgetError(f"slots is {slots}: a cache needs at least one")
        unknown = [p for p in policies if p != "belady" and p not in POLICIES]
        if unknown:
            raise MixoffError(f"unknown policy {unknown[0]!r}: choose from belady, {', '.join(sorted(POLICIES))}")
        requests = [int(e) for e in requests]
        super().__init__(requests=requests, steps={policy: steps_of(requests, slots, policy) for policy in policies})

    def summary(self) -> str:
        """Hits and evicted experts of each policy, in one line."""
        parts = []
        for policy, steps in self.steps.items():
            hits = sum(step["hit"] for step in steps)
            victims = " ".join(str(step["evicted"]) for step in steps if step["evicted"] is not None)
            plural = "" if hits == 1 else "s"
            parts.append(f"{policy}: {hits} hit{plural} of {len(steps)}" + (f", evicts {victims}" if victims else ""))
        return "; ".join(parts)

    def figure(self) -> Figure:
        """All steps as a still figure: one row per policy, one column per request, hits and misses by letter."""
        S, T = len(next(iter(self.steps.values()))[0]["slots"]), len(self.requests)
        size = (0.42 * T + 1.2, 0.32 * (S + 1.4) * len(self.steps))
        fig, axes = plt.subplots(len(self.steps), 1, figsize=size, squeeze=False)
        for ax, (policy, steps) in zip(axes[:, 0], self.steps.items(), strict=True):
            for t, step in enumerate(steps):
                draw_step(ax, t, step)
            hits = sum(step["hit"] for step in steps)
            ax.set(xlim=(0, T), ylim=(S, 0), yticks=[], title=f"{policy}: {hits} hits of {T}")
            ax.set_xticks([t + 0.5 for t in range(T)], self.requests, fontsize=8)
            ax.spines[["left", "bottom"]].set_visible(False)
            ax.tick_params(length=0)
        axes[-1, 0].set_xlabel("request")
        return fig

    def __repr__(self) -> str:
        return f"EvictionStepper({len(self.requests)} requests, policies {', '.join(self.steps)})"


def draw_step(ax: Axes, t: int, step: dict) -> None:
    """Draw the slots after request t, one below the other; the requested expert shows hit or miss."""
    _, letter, colour = plots.STATES[plots.HIT if step["hit"] else plots.MISS]
    for s, expert in enumerate(step["slots"]):
        asked = expert == step["expert"]
        face, on = (colour, "white") if asked else ("none", plots.INK)
        ax.add_patch(Rectangle((t, s), 1, 1, facecolor=face, edgecolor=plots.LINE, linewidth=0.5, clip_on=False))
        label = "" if expert is None else f"{expert}{letter}" if asked else f"{expert}"
        ax.text(t + 0.5, s + 0.5, label, ha="center", va="center", fontsize=8, color=on)

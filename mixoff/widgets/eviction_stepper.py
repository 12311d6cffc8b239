"""The cache of one layer, request by request: the requested expert, the slots, and the expert that a policy evicts.

Letters: **S** slots. All steps are computed in Python with the package's policies and shown by the browser, so the
widget works without a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
from mixoff.widgets import browser, optimum

NAMES = {"belady": "Bélády", "lru": "LRU", "lfu": "LFU", "fifo": "FIFO"}  # as they are written in sentences


def steps_of(requests: Sequence[int], slots: int, policy: str) -> list[dict]:
    """What happens at each request.

    expert, hit, evicted, slots: the requested expert, whether it was there, which one went, and the slots afterwards
    why: reason for the eviction, empty without one
    arcs: [expert, request] of each candidate for eviction: the request that the policy judges it by, None for never
    """
    rule = optimum.for_pools([[[(0, e)] for e in requests]]) if policy == "belady" else policy
    cache = ExpertCache([slots], rule)
    residents: list[int | None] = [None] * slots
    steps: list[dict] = []
    past = Past()
    for t, expert in enumerate(requests):
        judged = past.judge(policy, requests[t + 1 :], [e for e in residents if e is not None])
        (grant,) = cache.access(0, [(0, expert)])
        residents[grant.slot] = expert
        evicted, hit = None if grant.evicted is None else grant.evicted[1], grant.kind == GRANTED
        step: dict = {"expert": expert, "hit": hit, "evicted": evicted, "slots": list(residents), "why": "", "arcs": []}
        if evicted is not None:
            step |= {"why": why(policy, evicted, judged, t, past.uses), "arcs": [[e, at] for e, at in judged.items()]}
        past.note(t, expert, hit)
        steps.append(step)
    return steps


@dataclass
class Past:
    """Of each expert: the request of its last use, the one that fetched it, and its uses since then."""

    used: dict[int, int] = field(default_factory=dict)
    came: dict[int, int] = field(default_factory=dict)
    uses: dict[int, int] = field(default_factory=dict)

    def note(self, t: int, expert: int, hit: bool) -> None:
        """Request t asks for `expert`."""
        self.used[expert] = t
        self.came[expert] = self.came[expert] if hit else t
        self.uses[expert] = self.uses[expert] + 1 if hit else 1

    def judge(self, policy: str, future: Sequence[int], residents: Sequence[int]) -> dict[int, int | None]:
        """The request by which a policy judges each resident: its next use, None for never, its last, or its arrival.

        Empty for policies that judge by something else. future: the requests after this one, which is the number of
        noted ones
        """
        t = 1 + max(self.used.values(), default=-1)
        ways: dict[str, Callable[[int], int | None]] = {
            "belady": lambda e: t + 1 + future.index(e) if e in future else None,
            "lru": self.used.__getitem__,
            "fifo": self.came.__getitem__,
        }
        return {e: ways[policy](e) for e in residents} if policy in ways else {}


def why(policy: str, evicted: int, judged: dict[int, int | None], t: int, uses: dict[int, int]) -> str:
    """The reason for an eviction at request t, in one sentence.

    >>> why("belady", 2, {2: 11, 5: 4}, 2, {})
    'Bélády evicts 2: its next use is 9 steps away, the farthest.'
    """
    begin, at = f"{NAMES.get(policy, policy)} evicts {evicted}", judged.get(evicted)
    if policy == "belady":
        return f"{begin}: it is never used again." if at is None else f"{begin}: {_next_use(at - t)}, the farthest."
    if policy == "lru" and at is not None:
        return f"{begin}: its last use was {_count(t - at, 'step')} ago, the longest."
    if policy == "fifo" and at is not None:
        return f"{begin}: it came {_count(t - at, 'step')} ago, before the others."
    return (
        f"{begin}: used {_count(uses[evicted], 'time')} since it came, the fewest." if policy == "lfu" else f"{begin}."
    )


def _next_use(steps: int) -> str:
    return f"its next use is {_count(steps, 'step')} away"


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


class EvictionStepper(anywidget.AnyWidget):
    """Step through `requests`, experts of one layer in order, with `slots` slots and any of `policies`.

    The reader guesses the victim before each eviction by clicking a slot, and the widget keeps the score, gives the
    reason, and draws arcs to the requests that decided. A second policy may race against the first.

    >>> EvictionStepper([1, 2, 3, 1], slots=2).summary()
    'lru: 0 hits of 4, evicts 1 2; belady: 1 hit of 4, evicts 2'
    """

    _esm = browser.module("eviction_stepper")
    _css = browser.style("eviction_stepper")
    requests = traitlets.List(traitlets.Int()).tag(sync=True)
    steps = traitlets.Dict().tag(sync=True)  # by policy
    names = traitlets.Dict().tag(sync=True)  # of policies, as they are written in sentences

    def __init__(self, requests: Sequence[int], slots: int = 3, policies: Sequence[str] = ("lru", "belady")) -> None:
        if slots < 1:
            raise BudgetError(f"slots is {slots}: a cache needs at least one")
        unknown = [p for p in policies if p != "belady" and p not in POLICIES]
        if unknown:
            raise MixoffError(f"unknown policy {unknown[0]!r}: choose from belady, {', '.join(sorted(POLICIES))}")
        requests = [int(e) for e in requests]
        names = {policy: NAMES.get(policy, policy) for policy in policies}
        super().__init__(requests=requests, steps={p: steps_of(requests, slots, p) for p in policies}, names=names)

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

"""The same sentence typed by four caches at their modelled speeds: none, LRU, the best possible, all resident.

Letters: **T** decoded tokens, **L** layers of the trace, **K** experts per token.
The routing is that of a recorded run. Times are those of a large model on a card, from `planning.speed`: each layer of
the trace represents as many layers of the model as it takes to make up all of them. Nothing here is measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import anywidget
import matplotlib.pyplot as plt
import numpy as np
import traitlets

from mixoff.cache.cache import ExpertCache
from mixoff.cache.events import MISS
from mixoff.cache.policies import Policy
from mixoff.classroom import plots
from mixoff.errors import MixoffError
from mixoff.planning import probe, speed
from mixoff.shapes.sizes import sizes_of
from mixoff.store.describe import shape_of
from mixoff.units import format_nbytes
from mixoff.widgets import browser, optimum

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PretrainedConfig

    from mixoff.planning.hardware import Hardware
    from mixoff.shapes.shape import ModelShape
    from mixoff.trace.trace import Trace

STYLES = ((":", "vermillion"), ("--", "blue"), ("-.", "green"), ("-", "purple"))  # of the lanes
PARTLY = 1 - 1e-9  # hit rate of a token without a miss on a card that does not hold every expert


@dataclass(frozen=True)
class Lane:
    """One contestant. note: what it keeps. waiting_s, computing_s, misses: of each token."""

    name: str
    note: str
    waiting_s: list[float]
    computing_s: list[float]
    misses: list[int]

    @property
    def seconds(self) -> list[float]:
        """Seconds of each token."""
        return [waits + computes for waits, computes in zip(self.waiting_s, self.computing_s, strict=True)]

    @property
    def tokens_per_s(self) -> float:
        """Mean speed over the sentence (modelled)."""
        return len(self.seconds) / sum(self.seconds)


def misses_of(trace: Trace, slots: int, policy: str | Callable[[], Policy]) -> np.ndarray:
    """Misses of each decoded token and layer, int (T, L), with `slots` slots per layer; prompts are read before."""
    layers = range(len(trace.layers))
    cache, counts = ExpertCache([slots] * len(layers), policy), np.zeros((trace.tokens, len(layers)), int)
    for t in range(trace.tokens):
        for layer in layers:
            keys = [(layer, int(e)) for e in trace.experts[t, layer]]
            counts[t, layer] = sum(grant.kind == MISS for grant in cache.access(layer, keys, bool(trace.is_prompt[t])))
    return counts[~trace.is_prompt]  # (T, L)


def future(trace: Trace) -> list[list[list[tuple[int, int]]]]:
    """Keys that each layer will ask for while decoding, call by call."""
    decoded = trace.experts[~trace.is_prompt]  # (T, L, K)
    return [[[(layer, int(e)) for e in experts] for experts in decoded[:, layer]] for layer in range(len(trace.layers))]


@dataclass(frozen=True)
class Clock:
    """Seconds of a token of a model on a machine, from its misses.

    computing: seconds without waiting for copies, by hit rate; 1.0 is for a card that holds every expert
    """

    computing: Callable[[float], float]
    layers: int
    top_k: int
    fetch_s: float
    expert_s: float

    @classmethod
    def of(cls, shape: ModelShape, scheme: str, machine: Hardware) -> Clock:
        """The clock of `speed.predict`, with every miss from RAM."""

        @functools.cache
        def computing(hit_rate: float) -> float:
            found = speed.predict(shape, scheme, machine, hit_rate)
            return found.seconds - found.terms["fetches"]

        step = speed.predict(shape, scheme, machine).step
        if step is None:
            raise MixoffError("the time model has no step for this machine")
        meanwhile = step.expert_s if step.overlap else 0.0
        return cls(computing, step.layers, step.top_k, step.link_s, meanwhile)

    def waiting_s(self, misses: np.ndarray) -> list[float]:
        """Seconds that each token waits for copies. misses: int (T, L), of the trace's layers."""
        waiting = np.maximum(0.0, misses * self.fetch_s - (self.top_k - misses) * self.expert_s)
        waiting = np.where(misses > 0, waiting, 0.0).sum(1) * self.layers / misses.shape[1]  # (T,)
        return [round(float(s), 5) for s in waiting]

    def computing_s(self, misses: np.ndarray, resident: bool = False) -> list[float]:
        """Seconds that each token computes. resident: whether the card holds every expert."""
        rates = 1 - misses.sum(1) / (misses.shape[1] * self.top_k)  # (T,)
        return [round(self.computing(1.0 if resident else min(PARTLY, float(rate))), 5) for rate in rates]


class Race(anywidget.AnyWidget):
    """Four panes that type `words`, one per decoded token of `trace`, each at its modelled speed.

    The speeds are those of `shape` on `hardware` with `slots` slots per layer and every copy in RAM. `.lanes` holds the
    contestants, `.summary()` their speeds in one line, and `.figure()` a still figure. Raises MixoffError for another
    number of words than decoded tokens, and for a model that asks for another number of experts than the trace.
    """

    _esm = browser.module("race")
    _css = browser.style("race")
    words = traitlets.List(traitlets.Unicode()).tag(sync=True)
    lead = traitlets.Unicode().tag(sync=True)  # text that is there before the race
    about = traitlets.Unicode().tag(sync=True)
    panes = traitlets.List(traitlets.Dict()).tag(sync=True)  # the lanes
    asked = traitlets.Int().tag(sync=True)  # requests per token

    def __init__(
        self,
        trace: Trace,
        words: Sequence[str],
        lead: str = "",
        slots: int = 4,
        shape: ModelShape | PretrainedConfig | str = "mistralai/Mixtral-8x7B-Instruct-v0.1",
        scheme: str = "quality",
        hardware: str = "t4",
    ) -> None:
        described, machine = shape_of(shape), probe.named(hardware)
        self.clock = Clock.of(described, scheme, machine)
        decoded = int((~trace.is_prompt).sum())
        if len(words) != decoded:
            raise MixoffError(f"{len(words)} words for {decoded} decoded tokens: give the text of each of them")
        if trace.top_k != self.clock.top_k:
            raise MixoffError(f"the trace asks for {trace.top_k} experts per token, the model for {self.clock.top_k}")
        whole = format_nbytes(sizes_of(described, scheme).stored)
        fast = format_nbytes(machine.fast_bytes)
        notes = {"slots": f"{slots} of {trace.num_experts} experts per layer", "whole": f"{whole}; the card has {fast}"}
        self.lanes = self._lanes(trace, slots, notes)
        super().__init__(
            words=list(words), lead=lead, panes=[asdict(lane) for lane in self.lanes],
            about=_about(described, scheme, machine, len(trace.layers)),
            asked=trace.top_k * len(trace.layers),
        )  # fmt: skip

    def _lanes(self, trace: Trace, slots: int, notes: dict[str, str]) -> list[Lane]:
        cached = notes["slots"]
        best = optimum.for_pools(future(trace))
        none = np.full((int((~trace.is_prompt).sum()), len(trace.layers)), trace.top_k)
        runs = {
            ("without a cache", "every expert is fetched for every token"): none,
            ("LRU", f"keeps {cached}, evicts the least recently used"): misses_of(trace, slots, "lru"),
            ("best possible", f"keeps {cached}, knows what comes (Bélády)"): misses_of(trace, slots, best),
            ("all resident", f"would need {notes['whole']}"): 0 * none,
        }
        clock, lanes = self.clock, []
        for (name, note), misses in runs.items():
            computing = clock.computing_s(misses, resident=name == "all resident")
            lanes.append(Lane(name, note, clock.waiting_s(misses), computing, misses.sum(1).tolist()))
        return lanes

    def summary(self) -> str:
        """Speed and hit rate of each lane, in one line."""
        total = self.asked * len(self.words)
        rates = [
            f"{lane.name} {lane.tokens_per_s:.1f} (hit rate {1 - sum(lane.misses) / total:.2f})" for lane in self.lanes
        ]
        return f"tokens/s, modelled: {', '.join(rates)}"

    def figure(self) -> Figure:
        """Tokens over seconds as a still figure, one line per lane."""
        fig, ax = plt.subplots(figsize=(7, 3))
        for lane, (line, colour) in zip(self.lanes, STYLES, strict=True):
            label = f"{lane.name}, {lane.tokens_per_s:.1f} tokens/s"
            ax.plot(
                np.cumsum(lane.seconds),
                1 + np.arange(len(self.words)),
                line,
                color=plots.OKABE_ITO[colour],
                label=label,
            )
        ax.set(xlabel="seconds (modelled)", ylabel="tokens typed", xlim=(0, None), ylim=(0, None))
        ax.legend(frameon=False, loc="lower right")
        return fig

    def __repr__(self) -> str:
        return f"Race({len(self.words)} tokens, {', '.join(lane.name for lane in self.lanes)})"


def _about(shape: ModelShape, scheme: str, machine: Hardware, layers: int) -> str:
    name, each = shape.name.rpartition("/")[2], f"{len(shape.sites) / layers:g}"
    link = f"{(machine.link_Bps or 0) / 1e9:g} GB/s"
    return (
        f"Modelled: {name} in the scheme {scheme} on a {machine.name.upper()}, with all experts in the machine's RAM "
        f"behind a link of {link}. Words and routing are recorded from a model of {layers} layers, each of which "
        f"represents {each} of the large one."
    )

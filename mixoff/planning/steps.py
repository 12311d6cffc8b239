"""One token as events on three lanes: computing, link, disk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixoff.cache.events import Event


@dataclass(frozen=True)
class Step:
    """One decode step of an engine on a machine, in seconds per layer; its events are drawn at random from its rates.

    layers, top_k: L and K
    host_s: work during which no copy runs (Python, synchronisations)
    attention_s: the chip's work before the router's choice is known
    expert_s: the chip's work for one expert
    link_s, disk_s: time to move one expert over the link, and to read it from the disk before
    hit_rate: share of the requested experts that the fast tier holds
    disk_share: share of the misses that start on the disk
    recall: share of the misses that were guessed while the layer before was computed, None without prefetch; each other
        miss was guessed wrongly, and moved an expert in vain
    overlap: whether a layer's residents are computed during its fetches
    """

    layers: int
    top_k: int
    host_s: float
    attention_s: float
    expert_s: float
    link_s: float
    disk_s: float = 0.0
    hit_rate: float = 1.0
    disk_share: float = 0.0
    recall: float | None = None
    overlap: bool = True

    def events(self, tokens: int = 1, seed: int = 0) -> list[Event]:
        """Events with the same fields as the runtime's, so that both fit one Gantt chart.

        Kinds: `compute` (expert -1: attention), `host`, `miss` and `prefetch` on the link, `read` on the disk. A miss
        waits for the link until earlier prefetches have passed.
        """
        return _Clock(self, np.random.default_rng(seed)).run(tokens)

    def seconds(self, tokens: int = 64, seed: int = 0) -> float:
        """Mean time of a token over `tokens` of them."""
        return max(event.t1 for event in self.events(tokens, seed)) / tokens


class _Clock:
    """Simulates a step: one clock for the processor, and one per lane of copies."""

    def __init__(self, step: Step, rng: np.random.Generator) -> None:
        self.step, self.rng = step, rng
        self.events: list[Event] = []
        self.now = self.link = self.disk = 0.0
        self.guessed: list[float] = []  # when each guess for the next layer arrives

    def run(self, tokens: int) -> list[Event]:
        for token in range(1, tokens + 1):
            missing = self.rng.binomial(self.step.top_k, 1 - self.step.hit_rate, self.step.layers)  # (L,)
            right = self.rng.binomial(missing, self.step.recall or 0.0)  # (L,)
            right[0] = 0  # no guess is possible before the first layer
            for layer in range(self.step.layers):
                ahead = missing[layer + 1] if self.step.recall is not None and layer + 1 < self.step.layers else 0
                self._layer((token, layer), missing[layer] - right[layer], right[layer], ahead)
        return self.events

    def _layer(self, at: tuple[int, int], demanded: int, right: int, ahead: int) -> None:
        """One layer: attention, fetches of unguessed misses and of guesses for the next layer, experts, host work.

        right: misses that were guessed, so their fetch began during the layer before
        """
        s = self.step
        self._compute(at, -1, s.attention_s)
        arrived = self.guessed[:right] + [self._move(at, e, "miss") for e in range(right, right + demanded)]
        self.link = max(self.link, self.now)
        self.guessed = [self._move(at, e, "prefetch") for e in range(ahead)]
        if not s.overlap and arrived:
            self.now = max(self.now, *arrived)
        for e in range(len(arrived), s.top_k):
            self._compute(at, e, s.expert_s)
        for e, t in enumerate(arrived):
            self.now = max(self.now, t)
            self._compute(at, e, s.expert_s)
        if s.host_s:
            self.now = max(self.now, self.link)
            self._tell(at, -1, "host", self.now, s.host_s)
            self.now += s.host_s

    def _compute(self, at: tuple[int, int], expert: int, seconds: float) -> None:
        self._tell(at, expert, "compute", self.now, seconds)
        self.now += seconds

    def _move(self, at: tuple[int, int], expert: int, kind: str) -> float:
        """Move one expert; returns its time of arrival."""
        ready = self.now
        if self.rng.random() < self.step.disk_share:
            start = max(self.disk, self.now)
            self._tell(at, expert, "read", start, self.step.disk_s)
            ready = self.disk = start + self.step.disk_s
        start = max(self.link, ready)
        self._tell(at, expert, kind, start, self.step.link_s)
        self.link = start + self.step.link_s
        return self.link

    def _tell(self, at: tuple[int, int], expert: int, kind: str, t0: float, seconds: float) -> None:
        if seconds:
            self.events.append(Event(*at, expert, kind, 0, t0, t0 + seconds, "decode"))

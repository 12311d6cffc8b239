"""One token as events on three lanes: computing, link, disk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixoff.cache.events import Event

# Events of a step -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One decode step of an engine on a machine, in seconds a layer; what happens in it is drawn from its rates.

    host_s: work that hides no copy (Python, synchronisations). attention_s: the chip's, before the router is known.
    expert_s: the chip's, of an expert. link_s, disk_s: moving one expert over the link, and from the disk before.
    hit_rate: share of the experts asked for that the fast tier holds. disk_share: of the misses that start on disk.
    recall: share of the misses that the prefetch guessed while the layer before was computed, None without prefetch;
    each miss that it did not guess was guessed wrongly, so as many experts are moved in vain. overlap: whether a
    layer's residents are computed while its misses come.
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
        """What happens, by the same fields as the runtime's events, so that both make one Gantt chart.

        Kinds: `compute` (expert -1: attention), `host`, `miss` and `prefetch` on the link, `read` on the disk. A miss
        waits for the link until what was prefetched has passed; the last token ends the list.
        """
        return _Clock(self, np.random.default_rng(seed)).run(tokens)

    def seconds(self, tokens: int = 64, seed: int = 0) -> float:
        """Mean time of a token over `tokens` of them."""
        return max(event.t1 for event in self.events(tokens, seed)) / tokens


class _Clock:
    """Runs a step: one time for the processor, one for each lane of copies."""

    def __init__(self, step: Step, rng: np.random.Generator) -> None:
        self.step, self.rng, self.found = step, rng, []
        self.now = self.link = self.disk = 0.0
        self.guessed: list[float] = []  # when each guess for the next layer arrives

    def run(self, tokens: int) -> list[Event]:
        for token in range(1, tokens + 1):
            missing = self.rng.binomial(self.step.top_k, 1 - self.step.hit_rate, self.step.layers)  # (L,)
            right = self.rng.binomial(missing, self.step.recall or 0.0)  # (L,)
            right[0] = 0  # nothing comes before the first layer
            for layer in range(self.step.layers):
                ahead = missing[layer + 1] if self.step.recall is not None and layer + 1 < self.step.layers else 0
                self._layer((token, layer), missing[layer] - right[layer], right[layer], ahead)
        return self.found

    def _layer(self, at: tuple[int, int], demanded: int, right: int, ahead: int) -> None:
        """Attention, then the misses that nobody guessed, the experts, guesses for the next layer, the host's work.

        right: misses that were guessed: they came, or come, behind the layer before.
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
        """Bring one expert; returns when it is there."""
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
            self.found.append(Event(*at, expert, kind, 0, t0, t0 + seconds, "decode"))

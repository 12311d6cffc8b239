#!/usr/bin/env python3
"""Measures what a live CacheView adds to a token, events in place of a model: 48 layers of 128 experts, 8 asked for.

Prints milliseconds a token, measured: median, 90th percentile, mean. Does not draw; a browser does that by itself.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from mixoff.classroom.widgets import CacheView
from mixoff.events import Event

LAYERS, EXPERTS, TOP_K, TOKENS = 48, 128, 8, 400
HIT_RATE = 0.8


class Silent:
    """A runtime that says nothing of its own and hands on what it is given."""

    class source:
        """Sites as a runtime has them, by the two names that a view reads."""

        sites = [type("Site", (), {"layer": layer, "num_experts": EXPERTS}) for layer in range(LAYERS)]

    def resident(self) -> set:
        """Nothing yet."""
        return set()

    def on_event(self, listener) -> object:
        """Keeps the one listener."""
        self.tell = listener
        return lambda: None


def events(token: int, rng: np.random.Generator) -> list[Event]:
    """What one token makes happen."""
    made = []
    for layer in range(LAYERS):
        for expert in rng.choice(EXPERTS, TOP_K, replace=False):
            kind = "hit" if rng.random() < HIT_RATE else "miss"
            made.append(Event(token, layer, int(expert), kind, 0, 0.0, 0.0, "decode"))
    return made


def main() -> int:
    """Prints the figures."""
    runtime, rng = Silent(), np.random.default_rng(0)
    view, spent = CacheView(runtime), []
    for token in range(TOKENS):
        coming = events(token, rng)
        start = time.perf_counter()
        for event in coming:
            runtime.tell(event)
        spent.append((time.perf_counter() - start) * 1e3)
    view.detach()
    median, late = np.quantile(spent, [0.5, 0.9])
    print(f"{len(coming)} events a token: {median:.2f} ms median, {late:.2f} p90, {np.mean(spent):.2f} mean, measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())

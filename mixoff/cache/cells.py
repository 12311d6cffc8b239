"""A cache as cells to draw: the state of each expert in the newest pass, and counts of decoding and of prompts.

Letters: **L** layers, **E** experts per layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixoff.cache.events import Event

AWAY, RESIDENT, HIT, MISS, PREFETCHED, EVICTED = range(6)
CODES = {"hit": HIT, "miss": MISS, "prefetch": PREFETCHED, "evict": EVICTED}
AFTERWARDS = bytes([AWAY, RESIDENT, RESIDENT, RESIDENT, PREFETCHED, AWAY]).ljust(256, b"\0")  # the next pass's
Stats = tuple[int, int, int, int]


class Cells:
    """One state per expert, (L, E) in a row of bytes, which are the fastest to write.

    layers: numbers of the MoE layers
    experts: E
    resident: (layer, expert) of those in the fast tier now
    """

    def __init__(self, layers: Sequence[int], experts: int, resident: Iterable[tuple[int, int]] = ()) -> None:
        self.experts = experts
        self._first = {layer: i * experts for i, layer in enumerate(layers)}  # cell of each layer's first expert
        self._states = bytearray(len(layers) * experts)
        self.hits = self.misses = self.nbytes = 0
        self.prompt_misses = self.prompt_nbytes = 0
        for layer, expert in resident:
            self._states[self._first[layer] + expert] = RESIDENT

    def __len__(self) -> int:
        return len(self._states)

    def mark(self, row: int, expert: int, state: int) -> None:
        """Set the state of an expert of the layer in row `row`."""
        self._states[row * self.experts + expert] = state

    def note(self, event: Event) -> bool:
        """Take in one event of a runtime; False if it changes no cell."""
        state = CODES.get(event.kind)
        if state is None:
            return False
        self._states[self._first[event.layer] + event.expert] = state
        if event.phase == "decode":
            if state == HIT:
                self.hits += 1
            else:
                self.misses += state == MISS
                self.nbytes += event.nbytes
        else:
            self.prompt_misses += state == MISS
            self.prompt_nbytes += event.nbytes
        return True

    def frame(self) -> bytes:
        """The states now, (L, E)."""
        return bytes(self._states)

    def stats(self) -> Stats:
        """Hits, misses and bytes of decoding so far, and the number of residents."""
        residents = len(self._states) - self._states.count(AWAY) - self._states.count(EVICTED)
        return self.hits, self.misses, self.nbytes, residents

    def end_pass(self) -> None:
        """What was a hit or a miss is only resident from now on, and what was evicted is away."""
        self._states = self._states.translate(AFTERWARDS)

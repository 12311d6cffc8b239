"""One call of a MoE layer: what is there is computed while what is missing comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from mixoff.cache.cache import Grant
from mixoff.cache.events import BYPASS, HIT, RESTORE
from mixoff.cache.policies import Key
from mixoff.transfer.arena import Weight

if TYPE_CHECKING:
    from mixoff.runtime.runtime import Runtime

MOVES = ("miss", "bypass", "restore", "prefetch")  # kinds of fetches
Compute = Callable[[dict[int, dict[str, Weight]]], None]


class Call:
    """One call of one MoE layer: which grants wait in which slot of the arena until they are computed."""

    def __init__(self, runtime: Runtime, site: int, compute: Compute) -> None:
        self.runtime, self.site, self.compute = runtime, site, compute
        self.transfer, self.guesses, self.listened = runtime.transfer, runtime.guesses, bool(runtime._listeners)
        self.ready: dict[int, Grant] = {}  # their bytes are there
        self.coming: dict[int, Grant] = {}  # their bytes are on their way
        self.guessed: set[int] = set()  # slots that a guess began to fill

    def run(self, experts: list[int], weights: Sequence[float] | None) -> None:
        """Serve `experts`, from a fast tier that is as the last call left it if that ended, else empty."""
        runtime = self.runtime
        if not runtime.ended:
            runtime.renew()
        runtime.ended = False
        self.transfer.enter()
        self.guesses.judge(self.site, experts)
        prompt, pool = runtime.in_prompt(), 0 if runtime.scope == "global" else self.site
        keys = [(self.site, expert) for expert in experts]
        if runtime.whole_layers:
            others = set(range(runtime.source.sites[self.site].num_experts)).difference(experts)
            keys, weights = [*keys, *((self.site, expert) for expert in others)], None
        self.serve(runtime.cache.access(pool, keys, prompt, weights), prompt)
        runtime.ended = True

    def serve(self, grants: Iterable[Grant], prompt: bool) -> None:
        """Have everything fetched that is not here, compute what is, then the rest as it lands."""
        if prompt:  # it asks for nearly everything anyhow
            self.drop_guesses()
        for grant in grants:
            self.begin(grant)
        self.drop_guesses()
        if not prompt:
            self.guesses.fetch(self.site + 1, self.runtime.cache.slot_of.__contains__)
        ready, self.ready = self.ready, {}
        for found in [{slot: grant} for slot, grant in ready.items()] if self.listened else [ready]:
            self.finish(found)
        while self.coming:
            self.land(self.coming)

    def begin(self, grant: Grant) -> None:
        """Find the grant's slot in the arena, and have it filled unless it holds the expert already."""
        if grant.kind == HIT:
            self.ready[self.runtime.place[grant.slot]] = grant
            return
        slot = self.vacate(grant)
        if self.listened and grant.evicted is not None:
            self.tell(grant.evicted, "evict")
        guessed = self.guesses.take(grant.key, instead=slot)
        if guessed is None:
            self.transfer.fetch(grant.key, slot, grant.kind)
        else:
            slot = self.runtime.place[grant.slot] = guessed
            self.guessed.add(slot)
        self.coming[slot] = grant

    def vacate(self, grant: Grant) -> int:
        """The slot of the arena for a grant. Who waits in it is computed first; who only passes by keeps it, if a spare
        one can take its place, so that a prompt reads one expert while it computes another."""
        place = self.runtime.place
        while (slot := place[grant.slot]) in self.ready or slot in self.coming:
            passing = slot in self.coming and self.coming[slot].kind == BYPASS
            spare = self.guesses.lend(slot, self.coming) if passing else None
            if spare is not None:
                place[grant.slot] = spare
            elif slot in self.ready:
                self.finish({slot: self.ready.pop(slot)})
            else:
                self.land(self.coming if passing else [slot])
        return slot

    def drop_guesses(self) -> None:
        """This layer's fetches are under way, so guesses that are left proved wrong."""
        for key, landing in self.guesses.drop():
            if self.listened:
                self.tell(key, "prefetch", landing.nbytes, landing.t0, landing.t1)
                self.tell(key, "evict")

    def land(self, slots: Collection[int]) -> None:
        """Sleep until the bytes of one of `slots` are there, and compute it."""
        slot, nbytes, t0, t1 = self.transfer.wait(slots)
        grant = self.coming.pop(slot)
        if slot in self.guessed:
            self.guesses.counts["used_nbytes"] += nbytes
        if self.listened:
            kind = "prefetch" if grant.kind == RESTORE or slot in self.guessed else "miss"
            self.tell(grant.key, kind, nbytes, t0, t1)
        self.finish({slot: grant})

    def finish(self, found: dict[int, Grant]) -> None:
        """Compute from slots whose bytes are there, and let go of them; who was restored is not computed."""
        for slot, grant in found.items():
            if self.listened and (grant.kind == HIT or slot in self.guessed):
                self.tell(grant.key, "hit")
            self.guessed.discard(slot)
        found = {slot: grant for slot, grant in found.items() if grant.kind != RESTORE}
        if not found:
            return
        t0, weights = time.perf_counter(), self.runtime.arena.weights
        self.compute({grant.key[1]: weights(slot, grant.key[0]) for slot, grant in found.items()})
        for slot, grant in found.items():
            self.transfer.release(slot)
            if self.listened:
                self.tell(grant.key, "compute", 0, t0, time.perf_counter())
                if grant.kind == BYPASS:
                    self.tell(grant.key, "evict")

    def tell(self, key: Key, kind: str, nbytes: int = 0, t0: float | None = None, t1: float | None = None) -> None:
        now = time.perf_counter()
        self.runtime.tell(key, kind, nbytes, now if t0 is None else t0, now if t1 is None else t1)

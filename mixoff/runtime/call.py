"""One call of one MoE layer: what is resident is computed while what is missing is fetched.

The life of a miss, and the key of each table on its way:

    token
      | router                        experts in router order, with weights     by expert
      v
    backend.experts_forward           gathers each expert's rows
      | Runtime.serve, Call.run
      v
    ExpertCache.access                grants: hit, miss, bypass or restore      by key = (site, expert)
      | begin                         each grant names a cache slot             by cache slot
      v
    vacate                            place[cache slot] = arena slot; its
      | Transfer.fetch                last user is computed before the fetch
      v
    coming  (a hit goes to `ready`)   bytes are on their way                    by arena slot
      | land: Transfer.wait
      v
    finish                            compute(weights of one expert or more)    by expert
      | kernels
      v
    output rows                       Transfer.release(arena slot)

`place` is not the identity: a guess that proves right brings its spare arena slot with it, and the slot it replaces
becomes the spare one. A device's transfer likewise exchanges a slot that is copied back for a spare one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from mixoff.cache.cache import Grant
from mixoff.cache.events import BYPASS, HIT, RESTORE, Key
from mixoff.transfer.arena import Weight

if TYPE_CHECKING:
    from mixoff.runtime.runtime import Runtime

MOVES = ("miss", "bypass", "restore", "prefetch")  # kinds of fetches
Compute = Callable[[dict[int, dict[str, Weight]]], None]  # of weights by expert, then by part's name


class Call:
    """One call of one MoE layer: its grants by arena slot, until they are computed."""

    def __init__(self, runtime: Runtime, site: int, compute: Compute) -> None:
        self.runtime, self.site, self.compute = runtime, site, compute
        self.transfer, self.guesses = runtime.transfer, runtime.guesses
        self.listened = bool(runtime._listeners)
        # all three by arena slot; a slot is in `ready` or in `coming`, never in both
        self.ready: dict[int, Grant] = {}  # bytes have arrived
        self.coming: dict[int, Grant] = {}  # bytes are on their way
        self.guessed: set[int] = set()  # the fetch began as a guess

    def run(self, experts: list[int], weights: Sequence[float] | None) -> None:
        """Serve `experts`; if the last call did not end, from an empty fast tier."""
        runtime = self.runtime
        if not runtime.ended:
            runtime.renew()
        runtime.ended = False
        self.transfer.enter()
        self.guesses.judge(self.site, experts)
        prompt = runtime.in_prompt()
        pool = 0 if runtime.scope == "global" else self.site
        keys = [(self.site, expert) for expert in experts]
        if runtime.whole_layers:
            others = set(runtime.ranks.held[self.site]).difference(experts)
            keys, weights = [*keys, *((self.site, expert) for expert in others)], None
        self.serve(runtime.cache.access(pool, keys, prompt, weights), prompt)
        runtime.ended = True

    def serve(self, grants: Iterable[Grant], prompt: bool) -> None:
        """Begin every fetch, compute what is resident, then the rest as it lands."""
        if prompt:  # it asks for nearly all experts, so guesses only take slots
            self.drop_guesses()
        for grant in grants:
            self.begin(grant)
        self.drop_guesses()
        if not prompt:
            self.guesses.fetch(self.site + 1, self.runtime.cache.slot_of.__contains__)
        ready, self.ready = self.ready, {}
        if self.listened:  # one by one, so that each is timed
            for slot, grant in ready.items():
                self.finish({slot: grant})
        else:
            self.finish(ready)
        while self.coming:
            self.land(self.coming)

    def begin(self, grant: Grant) -> None:
        """Find the grant's arena slot, and begin to fill it unless it holds the expert already."""
        if grant.kind == HIT:
            self.ready[self.runtime.place[grant.slot]] = grant
            return
        slot = self.vacate(grant)
        if self.listened and grant.evicted is not None:
            self.tell(grant.evicted, "evict")
        guessed = self.guesses.take(grant.key, instead=slot)
        if guessed is None:
            slot = self.transfer.fetch(grant.key, slot, grant.kind)
        else:
            slot = guessed
            self.guessed.add(slot)
        self.runtime.place[grant.slot] = slot
        self.coming[slot] = grant

    def vacate(self, grant: Grant) -> int:
        """The arena slot for a grant, free to be fetched into.

        An expert in it that is not computed yet is computed first. A prompt streams many experts through one cache
        slot, so a bypass that is still coming may keep its arena slot if a spare one can replace it: then one expert is
        read while another is computed.
        """
        place = self.runtime.place
        # the loop ends: each round empties the slot, or maps the grant to a spare slot that nothing is coming into
        while (slot := place[grant.slot]) in self.ready or slot in self.coming:
            passing = slot in self.coming and self.coming[slot].kind == BYPASS
            # `lend` takes `slot` as a spare one in return; it is busy until its expert is computed, hence `coming`
            spare = self.guesses.lend(slot, self.coming) if passing else None
            if spare is not None:
                place[grant.slot] = spare
            elif slot in self.ready:
                self.finish({slot: self.ready.pop(slot)})
            else:  # for a bypass, whatever lands first will do: it may leave a spare slot that is not busy
                self.land(self.coming if passing else [slot])
        return slot

    def drop_guesses(self) -> None:
        """Drop the guesses that this layer did not take: they proved wrong."""
        for key, landing in self.guesses.drop():
            if self.listened:
                self.tell(key, "prefetch", landing.nbytes, landing.t0, landing.t1)
                self.tell(key, "evict")

    def land(self, slots: Collection[int]) -> None:
        """Sleep until the bytes of one of `slots` have arrived, and compute its expert."""
        slot, nbytes, t0, t1 = self.transfer.wait(slots)
        grant = self.coming.pop(slot)
        if slot in self.guessed:
            self.guesses.counts["used_nbytes"] += nbytes
        if self.listened:
            kind = "prefetch" if grant.kind == RESTORE or slot in self.guessed else "miss"
            self.tell(grant.key, kind, nbytes, t0, t1)
        self.finish({slot: grant})

    def finish(self, grants: dict[int, Grant]) -> None:
        """Compute the experts in these arena slots, then release the slots; a restored expert is not computed."""
        for slot, grant in grants.items():
            if self.listened and (grant.kind == HIT or slot in self.guessed):
                self.tell(grant.key, "hit")
            self.guessed.discard(slot)
        grants = {slot: grant for slot, grant in grants.items() if grant.kind != RESTORE}
        if not grants:
            return
        t0, weights = time.perf_counter(), self.runtime.arena.weights
        self.compute({grant.key[1]: weights(slot, grant.key[0]) for slot, grant in grants.items()})
        for slot, grant in grants.items():  # a slot is released only after its product: a fetch may overwrite it now
            self.transfer.release(slot)
            if self.listened:
                self.tell(grant.key, "compute", 0, t0, time.perf_counter())
                if grant.kind == BYPASS:
                    self.tell(grant.key, "evict")

    def tell(self, key: Key, kind: str, nbytes: int = 0, t0: float | None = None, t1: float | None = None) -> None:
        """Send an event to all listeners; a time that is None is now."""
        now = time.perf_counter()
        self.runtime.tell(key, kind, nbytes, now if t0 is None else t0, now if t1 is None else t1)

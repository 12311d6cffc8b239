"""Guesses which experts the next layer will ask for, and has them fetched into spare slots while this one computes.

A guess is the next router's choice for the hidden states of this layer, which change little between layers (Eliseev and
Mazur, arXiv 2312.17238, section 3.2). Guessed experts go into spare slots, never into the cache's. A cached expert is
never evicted for a guess, and the cache counts and evicts as if there were no guesses. A wrong guess is dropped as soon
as its layer is served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from mixoff.cache.events import PREFETCH, Key, Landing
from mixoff.transfer.transfer import Transfer

WINDOW = 32  # guesses before `auto` decides whether they pay
PAYS_FROM = 0.5  # share of right guesses: a wrong one costs a read, a right one saves at most a read


class Guesses:
    """Spare slots, the guesses fetched into them, and how many proved right.

    mode: `auto` stops when too few guesses prove right
    reason: whether guessing is on, and why
    counts: `fetched` and `used` guesses, `used_nbytes`; predicted experts (`named`), those asked for (`right`)
    """

    def __init__(self, spares: Sequence[int], transfer: Transfer, mode: str, reason: str) -> None:
        self.spares, self.transfer, self.mode, self.reason = list(spares), transfer, mode, reason
        self.active = reason.startswith("on")
        self.slot_of: dict[Key, int] = {}
        self.expected: dict[int, list[int]] = {}  # experts by site, best first
        self.counts: Counter[str] = Counter()

    def expect(self, site: int, experts: Sequence[int]) -> None:
        """Note that `site` will probably ask for `experts`; `fetch` gets them while the layer before computes."""
        self.expected[site] = list(experts)

    def reseat(self, spares: Sequence[int]) -> None:
        """Use these spare slots from now on, all empty."""
        self.slot_of, self.spares = {}, list(spares)

    def judge(self, site: int, experts: Collection[int]) -> None:
        """Count how many of the `experts` that `site` now asks for were predicted."""
        named = self.expected.pop(site, ())
        self.counts["named"] += len(named)
        self.counts["right"] += len(set(named) & set(experts))

    def take(self, key: Key, instead: int) -> int | None:
        """The slot that holds or will hold `key`, which the caller swaps for `instead`; None without a guess."""
        slot = self.slot_of.pop(key, None)
        if slot is not None:
            self.counts["used"] += 1
            self.spares.append(instead)
        return slot

    def lend(self, instead: int, busy: Collection[int]) -> int | None:
        """A spare slot that is not `busy`, which the caller swaps for `instead`; None if there is none."""
        slot = next((slot for slot in self.spares if slot not in busy), None)
        if slot is not None:
            self.spares[self.spares.index(slot)] = instead
        return slot

    def drop(self) -> list[tuple[Key, Landing]]:
        """Drop every guess that was not taken, since its layer is served; returns those of which bytes arrived."""
        wrong = [(key, self.transfer.cancel(slot)) for key, slot in self.slot_of.items()]
        self.spares += self.slot_of.values()
        self.slot_of.clear()
        return [(key, landing) for key, landing in wrong if landing]

    def fetch(self, site: int, cached: Callable[[Key], bool]) -> None:
        """Fetch the experts that `site` is expected to ask for, unless they are `cached` or a copy in RAM away."""
        if not self.active:
            return
        for key in ((site, expert) for expert in self.expected.get(site, ())):
            if self.spares and not cached(key) and key not in self.slot_of and not self.transfer.near(key):
                slot = self.spares.pop()
                self.slot_of[key] = slot  # known before the fetch, which may be interrupted
                self.slot_of[key] = self.transfer.fetch(key, slot, PREFETCH)
                self.counts["fetched"] += 1
        self._reconsider()

    def stop(self, why: str) -> None:
        """Stop guessing."""
        self.active, self.reason = False, f"off: {why}"
        self.expected.clear()

    def _reconsider(self) -> None:
        fetched, used = self.counts["fetched"] - len(self.slot_of), self.counts["used"]
        if self.mode == "auto" and fetched >= WINDOW and used < PAYS_FROM * fetched:
            self.stop(f"{used} of {fetched} experts fetched on a guess were asked for, too few to pay")

"""Guesses which experts the next layer will ask for, and has them fetched into spare slots while this one computes.

Letters: **T** tokens of a call, **K** experts a token.
The guess: the next layer's router, given what this layer's router is given (hidden states change little from layer to
layer; Eliseev and Mazur, arXiv 2312.17238, section 3.2). What is fetched on a guess takes a spare slot, never one of
the cache's, so a cached expert, which was asked for once, never gives way to one that may never be; the cache counts
and evicts as if there were no guesses. A guess that proves wrong is dropped as soon as its layer is served.

Does not know streams, files or policies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from mixoff.cache.events import PREFETCH, Key, Landing
from mixoff.shapes.config import top_k as configured_top_k
from mixoff.transfer.transfer import Transfer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


WINDOW = 32  # guesses after which `auto` looks at what came of them
PAYS_FROM = 0.5  # share of right guesses: a wrong one costs a read, a right one saves no more than a read


def top_k(config: PretrainedConfig) -> int:
    """Experts that the router chooses for a token, K; 2 where the configuration has no name for it that we know."""
    found = configured_top_k(config)
    return 2 if found is None else found


class Guesses:
    """Spare slots, what was fetched into them, and what came of it.

    mode: `auto` stops when too few guesses prove right. reason: whether it is on, and why. counts: `fetched` and `used`
    guesses, `used_nbytes`; `named` experts of a prediction, `right` ones of these.
    """

    def __init__(self, spares: Sequence[int], transfer: Transfer, mode: str, reason: str) -> None:
        self.spares, self.transfer, self.mode, self.reason = list(spares), transfer, mode, reason
        self.active = reason.startswith("on")
        self.slot_of: dict[Key, int] = {}
        self.expected: dict[int, list[int]] = {}  # experts by site, best first
        self.counts: Counter[str] = Counter()

    def expect(self, site: int, experts: Sequence[int]) -> None:
        """The router of `site` will choose `experts`, or so it seems; fetched once the layer before is under way."""
        self.expected[site] = list(experts)

    def reseat(self, spares: Sequence[int]) -> None:
        """Other spare slots from now on, with nothing in them."""
        self.slot_of, self.spares = {}, list(spares)

    def judge(self, site: int, experts: Collection[int]) -> None:
        """`site` asks for `experts` now: note how many of them were named."""
        named = self.expected.pop(site, ())
        self.counts["named"] += len(named)
        self.counts["right"] += len(set(named) & set(experts))

    def take(self, key: Key, instead: int) -> int | None:
        """The slot with the expert `key`, there or on its way, for which `instead` becomes a spare one."""
        slot = self.slot_of.pop(key, None)
        if slot is not None:
            self.counts["used"] += 1
            self.spares.append(instead)
        return slot

    def lend(self, instead: int, busy: Collection[int]) -> int | None:
        """A spare slot that is not `busy`, for which `instead` becomes a spare one; None when there is none."""
        slot = next((slot for slot in self.spares if slot not in busy), None)
        if slot is not None:
            self.spares[self.spares.index(slot)] = instead
        return slot

    def drop(self) -> list[tuple[Key, Landing]]:
        """Give up every guess that was not taken, since its layer is served; returns those of which bytes came."""
        wrong = [(key, self.transfer.cancel(slot)) for key, slot in self.slot_of.items()]
        self.spares += self.slot_of.values()
        self.slot_of.clear()
        return [(key, landing) for key, landing in wrong if landing]

    def fetch(self, site: int, cached: Callable[[Key], bool]) -> None:
        """Have the experts fetched that `site` is expected to want, unless they are `cached` or a mere copy away."""
        if not self.active:
            return
        for key in ((site, expert) for expert in self.expected.get(site, ())):
            if self.spares and not cached(key) and key not in self.slot_of and not self.transfer.near(key):
                self.slot_of[key] = self.spares.pop()
                self.transfer.fetch(key, self.slot_of[key], PREFETCH)
                self.counts["fetched"] += 1
        self._reconsider()

    def stop(self, why: str) -> None:
        """Guess no more."""
        self.active, self.reason = False, f"off: {why}"
        self.expected.clear()

    def _reconsider(self) -> None:
        fetched, used = self.counts["fetched"] - len(self.slot_of), self.counts["used"]
        if self.mode == "auto" and fetched >= WINDOW and used < PAYS_FROM * fetched:
            self.stop(f"{used} of {fetched} experts fetched on a guess were asked for, too few to pay")

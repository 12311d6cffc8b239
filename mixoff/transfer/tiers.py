"""Which tiers experts come through: from the reader alone, or through copies in RAM before it.

`RamTier` is a transfer that stands before another. What leaves the fast tier is kept in it, and what is asked for and
lies there is copied, not read. While there is room a copy stays behind, so that giving up its twin in the fast tier
costs nothing (inclusive); where RAM is short such doubles are the first to go, so that both tiers together hold as many
different experts as they have slots, but one (exclusive). Copies are made at once, by the thread that asks.

Does not know policies, models or files.
"""

from __future__ import annotations

import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence

import numpy as np

from mixoff.cache.events import BYPASS, MISS, Key, Landing
from mixoff.pages import slab
from mixoff.store.readers import Reader
from mixoff.transfer.transfer import ThreadTransfer, Transfer

WORKERS = 4  # requests in flight; more of them read no faster: docs/benchmarks.md
INLINE_BELOW = 1 << 20  # bytes; a smaller expert is copied from the page cache sooner than a thread has woken up


def open_transfer(reader: Reader, images: Sequence[memoryview], sizes: Sequence[int], ram_slots: int = 0) -> Transfer:
    """The transfer for `reader` on a CPU, with a RAM tier of `ram_slots` copies before it.

    images: memory of each slot of the fast tier. sizes: bytes of an expert, by site. Small experts that come from
    memory (a warm page cache, tensors) are read by the thread that asks, others by workers; no timing decides.
    """
    waits = getattr(reader, "direct", False) or (max(sizes) >= INLINE_BELOW and hasattr(reader, "piece_nbytes"))
    workers = min(WORKERS, 2 * (os.cpu_count() or 1)) if waits else 0
    transfer = ThreadTransfer(reader, images, sizes, workers)
    return RamTier(transfer, images, sizes, ram_slots) if ram_slots else transfer


class Copies:
    """Which experts have a copy in RAM, and in which of `places` places. Knows no memory.

    free: places without one. alone: of experts that the fast tier does not hold; doubles: of those that it holds as
    well; both oldest first.
    """

    def __init__(self, places: int) -> None:
        self.places, self.free = places, list(range(places))
        self.alone: OrderedDict[Key, int] = OrderedDict()
        self.doubles: OrderedDict[Key, int] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self.alone or key in self.doubles

    def double(self, key: Key) -> int:
        """The fast tier takes `key` too; returns the copy's place."""
        place = self.alone.pop(key) if key in self.alone else self.doubles.pop(key)
        self.doubles[key] = place
        return place

    def leave(self, key: Key) -> bool:
        """The fast tier gives `key` up; whether there is a copy, which is then alone."""
        if key in self.doubles:
            self.alone[key] = self.doubles.pop(key)
        return key in self.alone

    def part(self) -> None:
        """The fast tier gives everything up. What an interrupted change has left without a copy is a free place.

        A place is in `alone` or `doubles` only while its copy is whole: it goes in after the last byte, and out before
        the first of another.
        """
        self.alone, self.doubles = OrderedDict({**self.alone, **self.doubles}), OrderedDict()
        self.free = sorted(set(range(self.places)).difference(self.alone.values()))

    def room(self, usable: Callable[[int], bool] = lambda place: True) -> int | None:
        """A place for one more copy: a free one, else the oldest double's; None where none of these is `usable`."""
        for place in reversed(self.free):
            if usable(place):
                self.free.remove(place)
                return place
        key = next((key for key, place in self.doubles.items() if usable(place)), None)
        return None if key is None else self.doubles.pop(key)

    def oldest(self) -> int:
        """The place of the oldest copy, which goes."""
        return self.alone.popitem(last=False)[1]


class RamTier:
    """A transfer with `slots` copies in RAM before `inner`, in the order in which the fast tier gave them up.

    Raises OSError where the system has not the memory.
    """

    def __init__(self, inner: Transfer, images: Sequence[memoryview], sizes: Sequence[int], slots: int) -> None:
        self.inner, self.sizes = inner, sizes
        self.images = [np.frombuffer(image, np.uint8) for image in images]
        self.memory = slab(slots * len(images[0])).view(slots, -1).numpy()  # (slots, bytes)
        self.copies = Copies(slots)
        self.owner: dict[int, tuple[Key, str]] = {}  # what lies in each slot of the fast tier, and by which fetch
        self.coming: dict[int, tuple[Key, str]] = {}
        self.landed: dict[int, Landing] = {}
        self.copied: Counter[str] = Counter()

    def fetch(self, key: Key, slot: int, kind: str = MISS) -> None:
        """Keep what lies in `slot`, then copy `key` into it, or have it read."""
        self._let_go(slot)
        if self.near(key):
            self._copy(key, slot, kind)
        else:
            self.coming[slot] = (key, kind)
            self.inner.fetch(key, slot, kind)

    def wait(self, slots: Collection[int]) -> Landing:
        """Copies are there at once; the rest is the inner transfer's."""
        for slot in slots:
            if slot in self.landed:
                return self.landed.pop(slot)
        landing = self.inner.wait(slots)
        self.owner[landing.slot] = self.coming.pop(landing.slot)
        return landing

    def enter(self) -> None:
        """As the inner transfer has it."""
        self.inner.enter()

    def release(self, slot: int) -> None:
        """As the inner transfer has it: copies are made by the thread that computes."""
        self.inner.release(slot)

    def cancel(self, slot: int) -> Landing | None:
        """Let go of what lies in `slot` or comes to it."""
        self._let_go(slot)
        return self.inner.cancel(slot) if self.coming.pop(slot, None) else self.landed.pop(slot, None)

    def near(self, key: Key) -> bool:
        """Whether there is a copy of `key` here."""
        return key in self.copies

    def counts(self) -> Counter[str]:
        """Bytes by kind of fetch, and what of it was copied here."""
        return self.inner.counts() + self.copied

    def stop(self) -> None:
        """Forget every fetch; the copies stay."""
        self.inner.stop()
        self.coming, self.landed, self.owner = {}, {}, {}
        self.copies.part()

    def reseat(self, images: Sequence[memoryview]) -> None:
        """Other slots from now on; the copies stay."""
        self.stop()
        self.inner.reseat(images)
        self.images = [np.frombuffer(image, np.uint8) for image in images]

    def forked(self) -> None:
        """As the inner transfer has it; the copies are the child's own."""
        self.inner.forked()

    def close(self) -> None:
        """Give the copies' memory back, after the inner transfer ended."""
        self.inner.close()
        self.memory, self.images = None, []

    def _copy(self, key: Key, slot: int, kind: str) -> None:
        """Into the fast tier; the copy stays as a double."""
        t0, nbytes = time.perf_counter(), self.sizes[key[0]]
        place = self.copies.double(key)
        np.copyto(self.images[slot][:nbytes], self.memory[place, :nbytes])
        self.owner[slot] = (key, kind)
        self.copied = self.copied + Counter({kind: nbytes, "ram": nbytes, "ram_hits": 1})  # all three or none
        self.landed[slot] = Landing(slot, nbytes, t0, time.perf_counter())

    def _let_go(self, slot: int) -> None:
        """What leaves the fast tier stays here, the newest last; what only passed by takes no other's place."""
        key, kind = self.owner.pop(slot, (None, None))
        copies = self.copies
        if key is None or key in copies.alone or copies.leave(key):
            return
        if kind == BYPASS and not copies.free:
            return
        place, nbytes = copies.room(), self.sizes[key[0]]
        place = copies.oldest() if place is None else place
        np.copyto(self.memory[place, :nbytes], self.images[slot][:nbytes])
        copies.alone[key] = place

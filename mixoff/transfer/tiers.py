"""Which tiers experts come through: from the reader alone, or through copies in RAM before it.

`RamTier` is a transfer in front of another. It keeps experts that leave the fast tier, and copies them back on request
instead of reading them. While there is room, a copy stays in RAM, so evicting its double from the fast tier costs
nothing (inclusive). When RAM is short, doubles go first, so both tiers together hold as many different experts as they
have slots, minus one (exclusive). The calling thread makes the copies, at once.
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

WORKERS = 4  # requests in flight; more do not read faster: docs/benchmarks.md
INLINE_BELOW = 1 << 20  # bytes; a smaller expert is copied from the page cache sooner than a thread has woken up


def open_transfer(reader: Reader, images: Sequence[memoryview], sizes: Sequence[int], ram_slots: int = 0) -> Transfer:
    """The transfer for `reader` on a CPU, with a RAM tier of `ram_slots` copies in front of it.

    The calling thread reads small experts that come from memory (a warm page cache, tensors); workers read all others.
    The choice depends on sizes only, never on timing.

    images: memory of each slot of the fast tier
    sizes: bytes of an expert, by site
    """
    waits = getattr(reader, "direct", False) or (max(sizes) >= INLINE_BELOW and hasattr(reader, "piece_nbytes"))
    workers = min(WORKERS, 2 * (os.cpu_count() or 1)) if waits else 0
    transfer = ThreadTransfer(reader, images, sizes, workers)
    return RamTier(transfer, images, sizes, ram_slots) if ram_slots else transfer


class Copies:
    """Which experts have a copy in RAM, and in which of `places` places; the memory belongs to the caller.

    Each place is in at most one of the three below. It enters `alone` or `doubles` after the last byte of its copy was
    written, and leaves before the first byte of another. So an interrupt may lose a place, until `part` finds it again,
    but a copy that is listed is always whole.

    free: places without a copy
    alone: places of experts that the fast tier does not hold, oldest first
    doubles: places of experts that the fast tier holds as well, oldest first
    """

    def __init__(self, places: int) -> None:
        self.places, self.free = places, list(range(places))
        self.alone: OrderedDict[Key, int] = OrderedDict()
        self.doubles: OrderedDict[Key, int] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self.alone or key in self.doubles

    def double(self, key: Key) -> int:
        """The fast tier gets `key` too: mark its copy as a double; returns the copy's place."""
        place = self.alone.pop(key) if key in self.alone else self.doubles.pop(key)
        self.doubles[key] = place
        return place

    def leave(self, key: Key) -> bool:
        """The fast tier drops `key`: a copy of it is alone now; returns whether there is one."""
        if key in self.doubles:
            self.alone[key] = self.doubles.pop(key)
        return key in self.alone

    def part(self) -> None:
        """The fast tier drops everything: all copies are alone, and every place without a copy is free again."""
        self.alone, self.doubles = OrderedDict({**self.alone, **self.doubles}), OrderedDict()
        self.free = sorted(set(range(self.places)).difference(self.alone.values()))

    def room(self, usable: Callable[[int], bool] = lambda place: True) -> int | None:
        """A place for one more copy: a free one, else the oldest double's; None if none of these is `usable`."""
        for place in reversed(self.free):
            if usable(place):
                self.free.remove(place)
                return place
        key = next((key for key, place in self.doubles.items() if usable(place)), None)
        return None if key is None else self.doubles.pop(key)

    def oldest(self) -> int:
        """Drop the oldest copy that is alone; returns its place."""
        return self.alone.popitem(last=False)[1]


class RamTier:
    """A transfer with `slots` copies in RAM in front of `inner`, in the order in which they left the fast tier.

    Raises OSError if the system does not have the memory.
    """

    def __init__(self, inner: Transfer, images: Sequence[memoryview], sizes: Sequence[int], slots: int) -> None:
        self.inner, self.sizes = inner, sizes
        self.images = [np.frombuffer(image, np.uint8) for image in images]
        self.memory = slab(slots * len(images[0])).view(slots, -1).numpy()  # (slots, bytes)
        self.copies = Copies(slots)
        self.owner: dict[int, tuple[Key, str]] = {}  # expert in each slot of the fast tier, and kind of its fetch
        self.coming: dict[int, tuple[Key, str]] = {}
        self.landed: dict[int, Landing] = {}
        self.copied: Counter[str] = Counter()

    def fetch(self, key: Key, slot: int, kind: str = MISS) -> int:
        """Keep the expert in `slot`, then copy `key` into the slot, or have it read."""
        self._let_go(slot)
        if self.near(key):
            self._copy(key, slot, kind)
        else:
            self.coming[slot] = (key, kind)
            self.inner.fetch(key, slot, kind)
        return slot

    def wait(self, slots: Collection[int]) -> Landing:
        """Report copies at once; for the rest, ask the inner transfer."""
        for slot in slots:
            if slot in self.landed:
                return self.landed.pop(slot)
        landing = self.inner.wait(slots)
        self.owner[landing.slot] = self.coming.pop(landing.slot)
        return landing

    def enter(self) -> None:
        """Passed on to the inner transfer."""
        self.inner.enter()

    def release(self, slot: int) -> None:
        """Passed on to the inner transfer: copies are made by the thread that computes."""
        self.inner.release(slot)

    def cancel(self, slot: int) -> Landing | None:
        """Drop what is in `slot` or on its way to it."""
        self._let_go(slot)
        return self.inner.cancel(slot) if self.coming.pop(slot, None) else self.landed.pop(slot, None)

    def near(self, key: Key) -> bool:
        """Whether `key` has a copy here."""
        return key in self.copies

    def counts(self) -> Counter[str]:
        """Bytes by kind of fetch, and the part that was copied here."""
        return self.inner.counts() + self.copied

    def stop(self) -> None:
        """Forget every fetch; the copies stay."""
        self.inner.stop()
        self._forget()

    def _forget(self) -> None:
        self.coming, self.landed, self.owner = {}, {}, {}
        self.copies.part()

    def reseat(self, images: Sequence[memoryview], spares: Sequence[int] = ()) -> None:
        """Use other slots from now on; the copies stay."""
        self.inner.reseat(images)  # which stops it
        self._forget()
        self.images = [np.frombuffer(image, np.uint8) for image in images]

    def forked(self) -> None:
        """Passed on to the inner transfer; the child has its own copies."""
        self.inner.forked()

    def close(self) -> None:
        """Free the copies' memory, after the inner transfer ended."""
        self.inner.close()
        self.memory, self.images = None, []

    def _copy(self, key: Key, slot: int, kind: str) -> None:
        """Copy `key` into the fast tier; its copy here becomes a double."""
        t0, nbytes = time.perf_counter(), self.sizes[key[0]]
        place = self.copies.double(key)
        np.copyto(self.images[slot][:nbytes], self.memory[place, :nbytes])
        self.owner[slot] = (key, kind)
        self.copied = self.copied + Counter({kind: nbytes, "ram": nbytes, "ram_hits": 1})  # all three or none
        self.landed[slot] = Landing(slot, nbytes, t0, time.perf_counter())

    def _let_go(self, slot: int) -> None:
        """Keep the expert that leaves `slot`, newest last; one that only passed by never replaces another."""
        key, kind = self.owner.pop(slot, (None, None))
        copies = self.copies
        if key is None or key in copies.alone or copies.leave(key):
            return
        if kind == BYPASS and not copies.free:
            return
        place, nbytes = copies.room(), self.sizes[key[0]]
        place = copies.oldest() if place is None else place  # listed nowhere until its bytes are complete
        np.copyto(self.memory[place, :nbytes], self.images[slot][:nbytes])
        copies.alone[key] = place

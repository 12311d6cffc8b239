"""A transfer that does the worst the protocol allows, and one that watches whether the protocol is kept.

`Poisoned` delivers nothing before it is waited for, in an order that the test draws, and fills slots with 0xFF (not a
number in any float, noise in any code) from the moment they are fetched into or given up. `Watched` stands before any
transfer and notes what a GPU would punish: a slot read before its bytes came, or refilled before it was released.
"""

from collections import Counter

from mixoff.cache.events import Landing
from mixoff.transfer.tiers import RamTier


class Poisoned:
    """choose: picks one of a list of slots; the test's schedule."""

    def __init__(self, reader, images, sizes, choose):
        self.reader, self.images, self.sizes, self.choose = reader, images, sizes, choose
        self.coming, self.moved = {}, Counter()
        for slot in range(len(images)):
            self._poison(slot)

    def _poison(self, slot):
        self.images[slot][:] = b"\xff" * len(self.images[slot])

    def enter(self):
        pass

    def stop(self):
        for slot in list(self.coming):
            self.cancel(slot)

    def reseat(self, images, spares=()):
        self.images, self.coming = images, {}
        for slot in range(len(images)):
            self._poison(slot)

    def fetch(self, key, slot, kind="miss"):
        self._poison(slot)
        self.coming[slot] = key, kind
        return slot

    def wait(self, slots):
        slot = self.choose(sorted(slots))
        key, kind = self.coming.pop(slot)
        nbytes = self.reader.read_into(*key, self.images[slot])
        self.moved[kind] += nbytes
        return Landing(slot, nbytes, 0.0, 0.0)

    def release(self, slot):
        pass

    def cancel(self, slot):
        if self.coming.pop(slot, None):
            self._poison(slot)

    def near(self, key):
        return False

    def counts(self):
        return self.moved.copy()

    def close(self):
        pass


class Watched:
    """violations: what was done in the wrong order, in words."""

    def __init__(self, inner):
        self.inner, self.violations = inner, []
        self.coming, self.reading = set(), set()

    def _expect(self, kept, words):
        if not kept:
            self.violations.append(words)

    def read(self, slot):
        """Somebody takes the weights in `slot`."""
        self._expect(slot not in self.coming, f"slot {slot} is read before its bytes came")
        self.reading.add(slot)

    def enter(self):
        self.inner.enter()

    def stop(self):
        self.coming, self.reading = set(), set()
        self.inner.stop()

    def reseat(self, images, spares=()):
        self.coming, self.reading = set(), set()
        self.inner.reseat(images)

    def fetch(self, key, slot, kind="miss"):
        self._expect(slot not in self.coming, f"slot {slot} is fetched into twice at once")
        self._expect(slot not in self.reading, f"slot {slot} is refilled before it was released")
        self.coming.add(slot)
        return self.inner.fetch(key, slot, kind)

    def wait(self, slots):
        self._expect(set(slots) <= self.coming, f"{sorted(slots)} are waited for and not coming")
        landing = self.inner.wait(slots)
        self.coming.discard(landing.slot)
        return landing

    def release(self, slot):
        self._expect(slot in self.reading, f"slot {slot} is released and was not read")
        self.reading.discard(slot)
        self.inner.release(slot)

    def cancel(self, slot):
        self.coming.discard(slot)
        return self.inner.cancel(slot)

    def near(self, key):
        return self.inner.near(key)

    def counts(self):
        return self.inner.counts()

    def close(self):
        self.inner.close()


def poisoned(choose, made):
    """In place of `tiers.open_transfer`; every transfer that it makes is appended to `made`."""

    def open_transfer(reader, images, sizes, ram_slots=0):
        inner = Poisoned(reader, images, sizes, choose)
        made.append(Watched(RamTier(inner, images, sizes, ram_slots) if ram_slots else inner))
        return made[-1]

    return open_transfer


def watch(runtime):
    """Tell the runtime's transfer whenever weights are taken from a slot."""
    honest = runtime.arena.weights

    def weights(slot, site):
        runtime.transfer.read(slot)
        return honest(slot, site)

    runtime.arena.weights = weights

"""A device that computes late: its streams are queues, emptied in any order that the events in them allow.

Copies take two steps, with 0xFF in the target between them (not a number in any float), and note whether their source
changed meanwhile. A product is queued as the question whether what it reads is still there when its turn comes. What
goes wrong is in `violations`, in words. `rng` is the test's schedule.
"""

import random
import weakref
from collections import deque

import torch
from torch.utils._python_dispatch import _disable_current_modes

import recorded
from mixoff.transfer.arena import Arena
from mixoff.transfer.cuda import Gpu


class Event:
    def __init__(self, device):
        self.device, self.passed = device, [True]  # not recorded yet: counts as reached

    def query(self):
        self.device.drift()
        self.device.asked += 1
        assert self.device.asked < 1000, "the host asks again and again instead of sleeping"
        return self.passed[0]

    def synchronize(self):
        self.device.waits += 1
        self.device.run_until(self.passed)


class Stream:
    def __init__(self, device, name):
        self.device, self.name, self.queue = device, name, deque()

    def wait_event(self, event):
        self.queue.append(("wait", event.passed))
        self.device.drift()

    def record_event(self, event):
        event.passed = [False]
        self.queue.append(("record", event.passed))
        self.device.drift()

    def runnable(self):
        return bool(self.queue) and (self.queue[0][0] != "wait" or self.queue[0][1][0])

    def step(self):
        kind, *what = self.queue.popleft()
        with _disable_current_modes():  # the card's work is none of the host's calls
            getattr(self, f"_{kind}")(*what)

    def _wait(self, passed):
        pass

    def _record(self, passed):
        passed[0] = True

    def _copy(self, target, source):
        target.fill_(255)
        self.queue.appendleft(("arrive", target, source, source.clone()))

    def _arrive(self, target, source, seen):
        if not torch.equal(source, seen):
            self.device.violations.append("a source changed while it was copied")
        target.copy_(source)

    def _garbage(self, memory):
        memory.fill_(255)

    def _product(self, weights, expected):
        if not torch.equal(weights, expected):
            self.device.violations.append(f"a product on {self.name} read what was not its expert")


class Memory(bytearray):
    """Memory of the device, which can be watched."""


class Device:
    """streams: how many threads compute, each on its own; `thread` is the one that calls.

    pace: how many steps it may take whenever it is called. room: the longest memory that it can allocate.
    held: bytes that its allocator has from the card, freed ones too until `give_back`; live: those in use.
    waits: how often the host waited for an event. replays: of graphs.
    """

    where = torch.device("cpu")
    sm, name = (8, 9), "Simulated L4"

    def __init__(self, rng, streams=1, room=None, pace=(0, 0, 0, 1, 3)):
        self.rng, self.room, self.pace, self.violations = rng, room, pace, []
        self.thread = self.refused = self.asked = self.given_back = self.waits = self.replays = 0
        self.held = self.live = 0
        self.copying, self.returning = Stream(self, "the copying stream"), Stream(self, "the returning stream")
        self.streams = [Stream(self, f"stream {i}") for i in range(streams)]
        self.pinned_now = []
        self.transfer = self.reader = None

    def computing(self):
        return self.streams[self.thread]

    def event(self):
        return Event(self)

    def empty(self, nbytes):
        if self.room is not None and nbytes > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError(f"tried to allocate {nbytes} bytes, {self.room} are free")
        memory = self._allocate(nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)
        self.computing().queue.append(("garbage", memory))  # the last user of this memory is not done with it
        return memory

    def pinned(self, nbytes):
        memory = torch.full((-(-nbytes // 4096) * 4096,), 255, dtype=torch.uint8)
        self.pinned_now.append(memory.data_ptr())
        return memory[:nbytes]

    def unpin(self, memory):
        self.rng = random.Random(0)  # nobody's schedule: this may be long after the test
        self.synchronize()
        self.pinned_now.remove(memory.data_ptr())

    def copy(self, stream, target, source):
        stream.queue.append(("copy", target, source))
        self.drift()

    def capture(self, work):
        result, replay = recorded.capture(work)

        def replayed():
            self.replays += 1
            replay()

        return result, replayed

    def synchronize(self):
        while any(stream.queue for stream in self._all()):
            self._step()

    def give_back(self):
        self.given_back += 1
        self.held = self.live

    def describe(self):
        """A card with `room` free, or with plenty, less what the allocator holds."""
        return Gpu(self.name, self.sm, 1 << 30, (self.room or 1 << 30) - self.held)

    def _allocate(self, nbytes):
        memory = Memory(b"\xff" * nbytes)
        weakref.finalize(memory, self._free, nbytes)
        self.live += nbytes
        self.held = max(self.held, self.live)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _free(self, nbytes):
        self.live -= nbytes

    # what only tests call

    def product(self, weights, expected):
        """Queue a product that reads `weights` and should find the bytes `expected` there."""
        self.computing().queue.append(("product", weights, expected))
        self.drift()

    def catch_up(self):
        """Do what the computing stream waits for, but nothing that it computes unless it must be."""
        for kind, *what in list(self.computing().queue):
            if kind in ("wait", "garbage"):
                self.run_until(what[0]) if kind == "wait" else self.run_past(what[0])

    def run_past(self, memory):
        while any(op[0] == "garbage" and op[1] is memory for stream in self._all() for op in stream.queue):
            self._step()

    def run_until(self, passed):
        while not passed[0]:
            self._step()

    def drift(self):
        """Time passes: the device does as much as it likes."""
        for _ in range(self.rng.choice(self.pace)):
            if any(stream.runnable() for stream in self._all()):
                self._step()

    def uses(self, memory):
        """Whether anything queued reads or writes `memory`."""
        ops = [op for stream in self._all() for op in stream.queue]
        storage = memory.untyped_storage().data_ptr()
        tensors = [t for op in ops for t in op[1:] if isinstance(t, torch.Tensor)]
        return any(t.untyped_storage().data_ptr() == storage for t in tensors)

    def _all(self):
        return [self.copying, self.returning, *self.streams]

    def _step(self):
        ready = [stream for stream in self._all() if stream.runnable()]
        assert ready, "streams wait for each other"
        self.asked = 0
        self.rng.choice(ready).step()


def products_of(device):
    """`Arena.weights`, which first does what a product would wait for, and asks whether its expert is there.

    It asks nothing before the test has given `device` its transfer and reader.
    """
    honest = Arena.weights

    def weights(arena, slot, site):
        device.catch_up()
        if device.transfer is None:
            return honest(arena, slot, site)
        key, n = device.transfer.owner[slot][0], arena.sites[site].expert_nbytes
        image = bytearray(n)
        device.reader.read_into(*key, memoryview(image))
        device.product(arena.slots[slot][:n], torch.frombuffer(image, dtype=torch.uint8))
        return honest(arena, slot, site)

    return weights

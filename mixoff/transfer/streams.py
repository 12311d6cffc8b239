"""Moves experts into the slots of a device that computes on its own time: disk, page-locked RAM, device memory.

The host queues copies on one stream and products on another, and sleeps for neither. Events keep their order, both
ways: what computes from a slot waits for the event that its copy records (`arrived`), and the next copy into that slot
waits for the event that `release` records (`released`). Only a read from the disk goes into memory that no stream
guards, so it takes a place whose last copy is over (`touched`).

An expert that comes from the disk is read into a place in RAM, and its copy stays there while there is room. What
leaves the device without having one is copied back, as long as RAM has a place that no other expert needs.

Never run on a GPU so far: docs/gpu.md. Does not know policies, models or torch.cuda: `device` is `cuda.Cuda`, or the
tests' simulation of one.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mixoff.cache.events import BYPASS, MISS, PREFETCH, Key, Landing
from mixoff.errors import CheckpointError
from mixoff.store.readers import Reader
from mixoff.transfer.tiers import Copies, open_transfer
from mixoff.transfer.transfer import Transfer

STAGING = 3  # places that reads always find: one is read into while another is copied on, and one for a guess
WAITING, READING, SENT, FAILED = "waiting", "reading", "sent", "failed"


class Event(Protocol):
    """A mark in a stream's queue, as `torch.cuda.Event`: before it is first recorded it counts as reached."""

    def query(self) -> bool:
        """Whether the device has passed where it was last recorded."""

    def synchronize(self) -> None:
        """Sleep until it has."""


class Stream(Protocol):
    """A queue of work, done in order, as `torch.cuda.Stream`."""

    def wait_event(self, event: Event) -> None:
        """Queue: go on only when the device has passed where `event` was last recorded."""

    def record_event(self, event: Event) -> None:
        """Queue: pass `event`."""


class Device(Protocol):
    """A device with memory and streams of its own. copying: the stream of all copies. where: for tensors."""

    copying: Stream
    where: torch.device

    def computing(self) -> Stream:
        """The stream on which the calling thread computes."""

    def event(self) -> Event:
        """A new event."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory of the device, uint8. Raises torch.OutOfMemoryError."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """RAM that copies can use while the host goes on, uint8, exactly so much, given back by `unpin`."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Once all queued work is done, let go of what `pinned` gave."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue on `copying`: copy bytes between the device and pinned RAM."""

    def synchronize(self) -> None:
        """Sleep until all queued work is done."""

    def give_back(self) -> None:
        """Let other users have the memory of tensors that are no more."""


def open_device_transfer(
    device: Device, reader: Reader, slots: torch.Tensor, sizes: Sequence[int], ram_slots: int, experts: int
) -> DeviceTransfer:
    """The transfer for `reader` and a device. slots: (S, bytes) in its memory. sizes: bytes of an expert, by site.

    ram_slots: copies that RAM has room for, of `experts` in all; a few are allocated whatever it says.
    """
    places = min(max(ram_slots, STAGING), experts)
    kept = places if places == experts else places - STAGING
    return DeviceTransfer(device, slots, sizes, places, kept, lambda images: open_transfer(reader, images, sizes))


@dataclass(eq=False)
class _Fetch:
    """An expert on its way. place: where in RAM it lies, or is read to. t0: when it was asked for."""

    key: Key
    kind: str
    state: str = WAITING
    place: int | None = None
    t0: float = field(default_factory=time.perf_counter)
    error: Exception | None = None


class DeviceTransfer:
    """Slots in the memory of `device`, filled from `places` in RAM, which `reading` fills from the disk.

    kept: so many places may hold what the device lacks; the others are always there for reads. reading: makes the
    transfer that reads into the places' memory. Times of landings are those of queueing: the host does not wait to see
    a copy end.
    """

    def __init__(
        self,
        device: Device,
        slots: torch.Tensor,
        sizes: Sequence[int],
        places: int,
        kept: int,
        reading: Callable[[list[memoryview]], Transfer],
    ) -> None:
        self.device, self.sizes, self.kept = device, sizes, kept
        self.memory = device.pinned(places * slots.shape[1]).view(places, -1)  # (places, bytes)
        self._unpin = weakref.finalize(self, device.unpin, self.memory)
        self.reading = reading([memoryview(place.numpy()) for place in self.memory])
        self.copies = Copies(places)
        self.touched = [device.event() for _ in range(places)]  # the last copy from or to each place
        self.unsettled: set[int] = set()  # free places that a read which was given up may still write to
        self.coming: dict[int, _Fetch] = {}
        self.owner: dict[int, tuple[Key, str]] = {}  # whose copy into each slot was queued last, and its kind
        self.moved: Counter[str] = Counter()
        self.last = device.computing()
        self.reseat(slots)

    def enter(self) -> None:
        """Another stream than the last one's computes: it comes after all that the last one was given so far."""
        now = self.device.computing()
        if now != self.last:
            switch = self.device.event()
            self.last.record_event(switch)
            now.wait_event(switch)
            self.last = now

    def fetch(self, key: Key, slot: int, kind: str = MISS) -> None:
        """Queue the copy of `key`, or have it read first."""
        self.cancel(slot)
        self._let_go(slot)
        for other in [other for other, (held, _) in self.owner.items() if held == key]:
            del self.owner[other]  # where it only passed by; a copy in RAM is a double of the new one
        fetch = self.coming[slot] = _Fetch(key, kind)
        if key in self.copies:
            fetch.place = self.copies.double(key)
            self.moved = self.moved + Counter({"ram": self.sizes[key[0]], "ram_hits": 1})  # both or none
            self._send(slot, fetch)
        else:
            self._read_more()

    def wait(self, slots: Collection[int]) -> Landing:
        """Let the computing stream wait for a copy that is queued; the host sleeps only while the disk is read."""
        while (slot := self._sent(slots)) is None:
            self._read_more(slots)
            self._land(slots)
        fetch = self.coming.pop(slot)
        self.device.computing().wait_event(self.arrived[slot])
        return self._landing(slot, fetch)

    def release(self, slot: int) -> None:
        """What reads `slot` is queued: copies into it come after that."""
        self.device.computing().record_event(self.released[slot])

    def cancel(self, slot: int) -> Landing | None:
        """Drop a read; a copy that is queued goes on, and the next one into the slot comes after it."""
        fetch = self.coming.pop(slot, None)
        if fetch is None or fetch.state in (WAITING, FAILED):
            return None
        if fetch.state == READING:
            partly = self.reading.cancel(fetch.place)
            self.copies.free.insert(0, fetch.place)  # to be used last
            self.unsettled.add(fetch.place)
            return partly and partly._replace(slot=slot)
        self._let_go(slot, passing=True)
        return self._landing(slot, fetch)

    def near(self, key: Key) -> bool:
        """Never: each copy crosses the link, and a guess can hide that."""
        return False

    def counts(self) -> Counter[str]:
        """Bytes to the device by kind of fetch; `ram`, `ram_hits`: what was not read; `kept`: bytes copied back."""
        return self.moved.copy()

    def stop(self) -> None:
        """Forget every fetch, once the disk and the device are done; copies in RAM stay."""
        self.reading.stop()
        self.device.synchronize()
        self.coming, self.owner = {}, {}
        self.unsettled.clear()
        self.copies.part()
        self._trim()

    def reseat(self, slots: torch.Tensor | Sequence) -> None:
        """Other slots from now on; copies in RAM stay.

        Nothing queued uses the slots that were any more, nor what was in these before the allocator handed them out.
        """
        self.stop()
        self.slots = slots
        self.arrived, self.released = ([self.device.event() for _ in slots] for _ in range(2))

    def forked(self) -> None:
        """The device cannot be used here, nor is its page-locked RAM this process's to give back."""
        self.reading.forked()
        self._unpin.detach()

    def close(self) -> None:
        """End the reads, and give RAM back once all queued work is done."""
        self.reading.close()
        self._unpin()
        self.memory, self.slots = None, ()

    def _send(self, slot: int, fetch: _Fetch) -> None:
        """Queue the copy from a place to a slot."""
        nbytes, copying = self.sizes[fetch.key[0]], self.device.copying
        copying.wait_event(self.released[slot])
        self.device.copy(self.slots[slot][:nbytes], self.memory[fetch.place][:nbytes])
        copying.record_event(self.arrived[slot])
        copying.record_event(self.touched[fetch.place])
        fetch.state, self.owner[slot] = SENT, (fetch.key, fetch.kind)
        self.moved[fetch.kind] += nbytes

    def _sent(self, slots: Collection[int]) -> int | None:
        """One of `slots` whose copy is queued. Raises what a read of one of them did."""
        for slot in slots:
            if self.coming[slot].state == FAILED:
                raise self.coming.pop(slot).error
        return next((slot for slot in slots if self.coming[slot].state == SENT), None)

    def _landing(self, slot: int, fetch: _Fetch) -> Landing:
        return Landing(slot, self.sizes[fetch.key[0]], fetch.t0, time.perf_counter())

    def _read_more(self, wanted: Collection[int] = ()) -> None:
        """Have experts read as far as there are places: those waited for first, guesses last."""
        waiting = [slot for slot, fetch in self.coming.items() if fetch.state == WAITING]
        for slot in sorted(waiting, key=lambda slot: (slot not in wanted, self.coming[slot].kind == PREFETCH)):
            place = self.copies.room(lambda place: self.touched[place].query())
            if place is None:
                return
            fetch = self.coming[slot]
            self.unsettled.discard(place)  # the next read settles it
            fetch.state, fetch.place = READING, place
            self.reading.fetch(fetch.key, place, fetch.kind)

    def _land(self, slots: Collection[int]) -> None:
        """Sleep until a read is done, one for `slots` if there is any, and queue its copy."""
        under_way = {fetch.place: slot for slot, fetch in self.coming.items() if fetch.state == READING}
        mine = [place for place, slot in under_way.items() if slot in slots]
        if mine:
            self._pass_on(under_way[self.reading.wait(mine).slot])
        elif under_way:  # all places are taken by reads that nobody waits for yet
            self._land_other(*next(iter(under_way.items())))
        else:  # all places are being copied from: the one case in which the host waits for a copy
            self._places_in_use()[0].synchronize()

    def _land_other(self, place: int, slot: int) -> None:
        """As for a read that is waited for; but if it failed, that is for those to hear who asked for it."""
        try:
            self.reading.wait([place])
        except (OSError, CheckpointError) as error:
            if isinstance(error, TimeoutError):  # what handlers of alarms raise: not the read's
                raise
            fetch = self.coming[slot]
            fetch.state, fetch.error = FAILED, error
            self.copies.free.append(place)
        else:
            self._pass_on(slot)

    def _pass_on(self, slot: int) -> None:
        """What was read for `slot` is a copy in RAM now, and goes on to the device."""
        fetch = self.coming[slot]
        self.copies.doubles[fetch.key] = fetch.place
        self._send(slot, fetch)

    def _places_in_use(self) -> list[Event]:
        """Events of the places that reads might take, had the device let go of them."""
        return [self.touched[place] for place in (*self.copies.free, *self.copies.doubles.values())]

    def _let_go(self, slot: int, passing: bool = False) -> None:
        """What leaves the device stays in RAM; but what only passed by takes no other's place."""
        key, kind = self.owner.pop(slot, (None, None))
        if key is None:
            return
        passing = passing or kind == BYPASS
        if self.copies.leave(key):
            self._trim(key if passing else None)
        elif self.kept and not passing:
            self._keep(key, slot)

    def _keep(self, key: Key, slot: int) -> None:
        """Queue a copy back to RAM, where a place is free or holds a double. It comes after those queued before it."""
        place, nbytes = self.copies.room(lambda place: place not in self.unsettled), self.sizes[key[0]]
        if place is None:
            return
        self.device.copy(self.memory[place][:nbytes], self.slots[slot][:nbytes])
        self.device.copying.record_event(self.touched[place])
        self.copies.alone[key] = place
        self.moved["kept"] += nbytes
        self._trim()

    def _trim(self, first: Key | None = None) -> None:
        """Reads must find their places: the oldest copies go, or `first` does, where too many are alone."""
        alone = self.copies.alone
        while len(alone) > self.kept:
            self.copies.free.append(alone.pop(first if first in alone else next(iter(alone))))

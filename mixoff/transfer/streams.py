"""Moves experts into the slots of a device that computes asynchronously: disk, page-locked RAM, device memory.

The host queues copies to the device on one stream, copies back on another and products on a third, and waits for none.
Events keep them in order:

- A product waits until its slot's copy has arrived (`arrived`).
- The next copy into the slot waits for the last product (`released`) and the last copy back (`returned`) from it.
- Copies from and to a place in RAM follow each other (`touched`). A read from the disk goes into memory that no stream
  guards, so it takes a place whose last copy has finished.
- A copy back needs no other event: what it copies has arrived, since a later read or copy back took the place that it
  came from.

An expert from the disk is read into a place in RAM, and stays there while there is room. An expert that leaves the
device without a copy in RAM is copied back if RAM has a place that no other expert needs. So that a miss does not wait
for that, it takes one of `spares` in exchange: the link carries both directions at once.

Never run on a GPU so far: docs/gpu.md. `device` is `cuda.Cuda`, or the tests' simulation of one.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from mixoff.cache.events import BYPASS, MISS, PREFETCH, Key, Landing
from mixoff.errors import CheckpointError
from mixoff.store.readers import Reader
from mixoff.transfer.tiers import WORKERS, Copies, open_transfer
from mixoff.transfer.transfer import Transfer

STAGING = 3  # places reserved for reads: one to read into, one being copied from, and one for a guess
WAITING, READING, SENT, FAILED = "waiting", "reading", "sent", "failed"


class Event(Protocol):
    """A mark in a stream's queue, as `torch.cuda.Event`; it counts as reached until it is first recorded."""

    def query(self) -> bool:
        """Whether the device has reached the point where it was last recorded."""

    def synchronize(self) -> None:
        """Sleep until the device has reached that point."""


class Stream(Protocol):
    """A queue of work, done in order, as `torch.cuda.Stream`."""

    def wait_event(self, event: Event) -> None:
        """Queue: wait until the device has reached the point where `event` was last recorded."""

    def record_event(self, event: Event) -> None:
        """Queue: record `event`."""


class Device(Protocol):
    """A device with its own memory and streams.

    copying: stream of all copies to the device
    returning: stream of all copies back
    where: name of the device for tensors
    """

    copying: Stream
    returning: Stream
    where: torch.device

    def describe(self) -> Any:
        """The device: its compute capability `sm` and its free memory."""

    def computing(self) -> Stream:
        """The stream on which the calling thread computes."""

    def event(self) -> Event:
        """A new event."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory of the device, uint8. Raises torch.OutOfMemoryError."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """RAM of exactly that size, uint8, for copies that the host does not wait for; `unpin` releases it."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Release memory from `pinned`, once all queued work is done."""

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy between the device and pinned RAM on a stream."""

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What `work` returns, and a function that queues again what it queued, in the same memory.

        Nothing is done before that. Raises any kind of error for work that cannot be captured.
        """

    def synchronize(self) -> None:
        """Sleep until all queued work is done."""

    def give_back(self) -> None:
        """Return freed memory to the driver."""


def open_device_transfer(
    device: Device,
    reader: Reader,
    slots: torch.Tensor,
    sizes: Sequence[int],
    ram_slots: int,
    experts: int,
    spares: Sequence[int] = (),
) -> DeviceTransfer:
    """The transfer for `reader` and a device.

    slots: device memory (S, bytes)
    sizes: bytes of an expert, by site
    ram_slots: copies that RAM has room for; at least STAGING places are allocated in any case
    experts: number of experts in the model
    spares: slots for misses whose own slot is copied back
    """
    places = min(max(ram_slots, STAGING), experts)
    kept = places if places == experts else places - STAGING
    reading = lambda images: open_transfer(reader, images, sizes)  # noqa: E731
    return DeviceTransfer(device, slots, sizes, places, kept, reading, spares)


@dataclass(eq=False)
class _Fetch:
    """An expert on its way.

    place: its place in RAM, or the one it is read into; -1 while it waits for one
    t0: time of the request
    """

    key: Key
    kind: str
    state: str = WAITING
    place: int = -1
    t0: float = field(default_factory=time.perf_counter)
    error: Exception | None = None


class DeviceTransfer:
    """Slots in the memory of `device`, filled from `places` in RAM, which `reading` fills from the disk.

    A landing is timed when its copy is queued: the host does not wait for the copy to end.

    kept: number of places that may hold experts the device lacks; the others are always available for reads
    reading: maker of the transfer that reads into the places' memory
    spares: slots that hold nothing; `fetch` exchanges one for a slot that is copied back
    """

    def __init__(
        self,
        device: Device,
        slots: torch.Tensor,
        sizes: Sequence[int],
        places: int,
        kept: int,
        reading: Callable[[list[memoryview]], Transfer],
        spares: Sequence[int] = (),
    ) -> None:
        self.device, self.sizes, self.kept = device, sizes, kept
        self.memory = device.pinned(places * slots.shape[1]).view(places, -1)  # (places, bytes)
        self._unpin = weakref.finalize(self, device.unpin, self.memory)
        self.reading = reading([memoryview(place.numpy()) for place in self.memory])
        self.copies = Copies(places)
        self.touched = [device.event() for _ in range(places)]  # the last copy from or to each place
        self.unsettled: set[int] = set()  # free places that a cancelled read may still write to
        self.coming: dict[int, _Fetch] = {}
        self.owner: dict[int, tuple[Key, str]] = {}  # expert and kind of the last copy queued into each slot
        self.moved: Counter[str] = Counter()
        self.last = device.computing()
        self.reseat(slots, spares)

    def enter(self) -> None:
        """If another stream computes now, make it wait for all that the last one was given so far."""
        now = self.device.computing()
        if now != self.last:
            switch = self.device.event()
            self.last.record_event(switch)
            now.wait_event(switch)
            self.last = now

    def fetch(self, key: Key, slot: int, kind: str = MISS) -> int:
        """Queue the copy of `key`, or have it read first; into a spare slot if that of `slot` is copied back."""
        self.cancel(slot)
        if self._let_go(slot) and self.spares:
            self.spares.append(slot)
            slot = self.spares.popleft()
        for other in [other for other, (held, _) in self.owner.items() if held == key]:
            del self.owner[other]  # it was a bypass there; a copy in RAM is now a double of this slot
        fetch = self.coming[slot] = _Fetch(key, kind)
        if key in self.copies:
            fetch.place = self.copies.double(key)
            self.moved = self.moved + Counter({"ram": self.sizes[key[0]], "ram_hits": 1})  # both or none
            self._send(slot, fetch)
        else:
            self._read_more()
        return slot

    def wait(self, slots: Collection[int]) -> Landing:
        """Make the computing stream wait for a queued copy; the host itself waits only for the disk."""
        while (slot := self._sent(slots)) is None:
            self._read_more(slots)
            self._land(slots)
        fetch = self.coming.pop(slot)
        self.device.computing().wait_event(self.arrived[slot])
        return self._landing(slot, fetch)

    def release(self, slot: int) -> None:
        """The products that read `slot` are queued: make later copies into it wait for them."""
        self.device.computing().record_event(self.released[slot])

    def cancel(self, slot: int) -> Landing | None:
        """Drop a read; a queued copy goes on, and the next one into the slot comes after it."""
        fetch = self.coming.pop(slot, None)
        if fetch is None or fetch.state in (WAITING, FAILED):
            return None
        if fetch.state == READING:
            partly = self.reading.cancel(fetch.place)
            self.copies.free.insert(0, fetch.place)  # last in line: the cancelled read may still write to it
            self.unsettled.add(fetch.place)
            return partly and partly._replace(slot=slot)
        self._let_go(slot, passing=True)
        return self._landing(slot, fetch)

    def stock(self, keys: Iterable[Key]) -> Iterator[Key]:
        """Read experts into RAM while it has room for what the device lacks; yields each that has arrived.

        Called while nothing else is fetched. Raises the error of a failed read; `stop` then finds the places again.
        """
        self.device.synchronize()  # or a place might still be copied from
        coming: dict[int, Key] = {}
        for key in keys:
            if key in self.copies:
                continue
            if len(self.copies.alone) + len(coming) >= self.kept:
                break
            place = self.copies.room(lambda place: place not in self.unsettled)
            if place is None:
                break
            coming[place] = key
            self.reading.fetch(key, place, MISS)
            if len(coming) == WORKERS:
                yield self._stocked(coming)
        while coming:
            yield self._stocked(coming)

    def _stocked(self, coming: dict[int, Key]) -> Key:
        """Sleep until one of the reads into these places is done: its expert has a copy in RAM."""
        place = self.reading.wait(coming).slot
        key = coming.pop(place)
        self.copies.alone[key] = place
        return key

    def near(self, key: Key) -> bool:
        """Always False: every copy crosses the link, which a guess can hide."""
        return False

    def counts(self) -> Counter[str]:
        """Bytes to the device by kind of fetch; `ram`, `ram_hits`: fetches without a read; `kept`: copied back."""
        return self.moved.copy()

    def stop(self) -> None:
        """Forget every fetch, once the disk and the device are done; copies in RAM stay."""
        self.reading.stop()
        self.device.synchronize()
        self.coming, self.owner = {}, {}
        self.unsettled.clear()
        self.copies.part()
        self._trim()

    def reseat(self, slots: torch.Tensor | Sequence, spares: Sequence[int] = ()) -> None:
        """Use other slots from now on; copies in RAM stay.

        After `stop` nothing queued uses the old slots, or what the allocator had in the new ones before.
        """
        self.stop()
        self.slots, self.spares = slots, deque(spares)
        self.arrived, self.released, self.returned = ([self.device.event() for _ in slots] for _ in range(3))

    def forked(self) -> None:
        """In the child of a fork the device cannot be used, and its page-locked RAM belongs to the parent."""
        self.reading.forked()
        self._unpin.detach()

    def close(self) -> None:
        """End the reads, and free RAM once all queued work is done."""
        self.reading.close()
        self._unpin()
        self.memory, self.slots = None, ()

    def _send(self, slot: int, fetch: _Fetch) -> None:
        """Queue the copy from a place to a slot."""
        nbytes, copying = self.sizes[fetch.key[0]], self.device.copying
        copying.wait_event(self.released[slot])
        copying.wait_event(self.returned[slot])
        copying.wait_event(self.touched[fetch.place])
        self.device.copy(copying, self.slots[slot][:nbytes], self.memory[fetch.place][:nbytes])
        copying.record_event(self.arrived[slot])
        copying.record_event(self.touched[fetch.place])
        fetch.state, self.owner[slot] = SENT, (fetch.key, fetch.kind)
        self.moved[fetch.kind] += nbytes

    def _sent(self, slots: Collection[int]) -> int | None:
        """One of `slots` whose copy is queued, else None. Raises the error of a failed read of one of them."""
        for slot in slots:
            if error := self.coming[slot].error:
                del self.coming[slot]
                raise error
        return next((slot for slot in slots if self.coming[slot].state == SENT), None)

    def _landing(self, slot: int, fetch: _Fetch) -> Landing:
        return Landing(slot, self.sizes[fetch.key[0]], fetch.t0, time.perf_counter())

    def _read_more(self, wanted: Collection[int] = ()) -> None:
        """Begin as many reads as there are places: `wanted` slots first, guesses last.

        A place may be read into only after its last copy has finished (`touched`): a read is the one write that no
        stream orders. Free places are tried before those of doubles, and no place is taken from a copy that is alone.
        """
        waiting = [slot for slot, fetch in self.coming.items() if fetch.state == WAITING]
        for slot in sorted(waiting, key=lambda slot: (slot not in wanted, self.coming[slot].kind == PREFETCH)):
            place = self.copies.room(lambda place: self.touched[place].query())
            if place is None:
                return
            fetch = self.coming[slot]
            self.unsettled.discard(place)  # this read waits for the cancelled one
            fetch.state, fetch.place = READING, place
            self.reading.fetch(fetch.key, place, fetch.kind)

    def _land(self, slots: Collection[int]) -> None:
        """Sleep until a read is done, preferably one for `slots`, and queue its copy."""
        under_way = {fetch.place: slot for slot, fetch in self.coming.items() if fetch.state == READING}
        mine = [place for place, slot in under_way.items() if slot in slots]
        if mine:
            self._pass_on(under_way[self.reading.wait(mine).slot])
        elif under_way:  # reads for other slots hold all places
            self._land_other(*next(iter(under_way.items())))
        else:  # copies hold all places: the only case in which the host waits for a copy
            self._places_in_use()[0].synchronize()

    def _land_other(self, place: int, slot: int) -> None:
        """As `_land` for another slot's read; if it failed, the error is kept for the `wait` on that slot."""
        try:
            self.reading.wait([place])
        except (OSError, CheckpointError) as error:
            if isinstance(error, TimeoutError):  # from a handler of alarms, not from the read
                raise
            fetch = self.coming[slot]
            fetch.state, fetch.error = FAILED, error
            self.copies.free.append(place)
        else:
            self._pass_on(slot)

    def _pass_on(self, slot: int) -> None:
        """The expert read for `slot` is a copy in RAM now: send it on to the device."""
        fetch = self.coming[slot]
        self.copies.doubles[fetch.key] = fetch.place
        self._send(slot, fetch)

    def _places_in_use(self) -> list[Event]:
        """Events of the places that reads could take if the copies from them had finished."""
        return [self.touched[place] for place in (*self.copies.free, *self.copies.doubles.values())]

    def _let_go(self, slot: int, passing: bool = False) -> bool:
        """Keep the expert that leaves `slot` in RAM; one that only passed by never replaces another.

        Returns whether it is copied back.
        """
        key, kind = self.owner.pop(slot, (None, None))
        if key is None:
            return False
        passing = passing or kind == BYPASS
        if self.copies.leave(key):
            self._trim(key if passing else None)
            return False
        return bool(self.kept) and not passing and self._keep(key, slot)

    def _keep(self, key: Key, slot: int) -> bool:
        """Queue a copy back to a free place or a double's in RAM; returns whether there is one."""
        place, nbytes = self.copies.room(lambda place: place not in self.unsettled), self.sizes[key[0]]
        if place is None:
            return False
        returning = self.device.returning
        returning.wait_event(self.touched[place])
        self.device.copy(returning, self.memory[place][:nbytes], self.slots[slot][:nbytes])
        returning.record_event(self.returned[slot])
        returning.record_event(self.touched[place])
        self.copies.alone[key] = place
        self.moved["kept"] += nbytes
        self._trim()
        return True

    def _trim(self, first: Key | None = None) -> None:
        """Drop `first`, else the oldest copies, while more than `kept` are alone: reads need the other places."""
        alone = self.copies.alone
        while len(alone) > self.kept:
            self.copies.free.append(alone.pop(first if first and first in alone else next(iter(alone))))

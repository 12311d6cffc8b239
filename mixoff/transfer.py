"""Moves experts into slots in the background, and says when their bytes are there.

A `Transfer` fills a slot between `fetch` and the `wait` that reports it; a computation that read a slot is followed by
`release`, and only then may the slot be fetched into again. On a CPU worker threads read, and `release` has nothing to
do; a GPU's copy stream would make the computing stream wait for the copy's event, and the copy for the event that
`release` records. Tests run the runtime under a third, which delivers late and out of order, and poisons what is not
there yet.

Does not know policies or models.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mixoff.cache import MISS
from mixoff.readers import Reader

Key = tuple[int, int]  # site, expert
PREFETCH = "prefetch"  # a fetch that nobody asked for yet: what is asked for is read before it


class Landing(NamedTuple):
    """Bytes that arrived in a slot: `nbytes` of them, between t0 and t1 (seconds of `time.perf_counter`)."""

    slot: int
    nbytes: int
    t0: float
    t1: float


class Transfer(Protocol):
    """Fills slots of the fast tier. Called by one thread at a time."""

    def enter(self) -> None:
        """A call of a layer begins, on the calling thread: what follows may use all that landed before."""

    def fetch(self, key: Key, slot: int, kind: str = MISS) -> None:
        """Begin to fill `slot` with the expert `key`; kind: of `cache.Grant`, or `prefetch`, which waits for others."""

    def wait(self, slots: Collection[int]) -> Landing:
        """Sleep until the fetch into one of `slots` is done, and report it once. Raises what went wrong with it."""

    def release(self, slot: int) -> None:
        """What reads `slot` has been computed (or queued, on a device): it may be fetched into."""

    def cancel(self, slot: int) -> Landing | None:
        """Nobody wants what is on its way to `slot` any more: its content is undefined until it is fetched into.

        Returns what had arrived, None where nothing had.
        """

    def near(self, key: Key) -> bool:
        """Whether fetching `key` is a mere copy in memory, which a guess could not hide."""

    def counts(self) -> Counter[str]:
        """Bytes so far by kind of fetch; of all these, `ram`: bytes from a RAM tier, in `ram_hits` fetches."""

    def reseat(self, slots: Sequence) -> None:
        """Forget the slots, whose fetches are over or given up, and fill these from now on; none lets go of memory."""

    def close(self) -> None:
        """End the fetches. Slots may be freed afterwards."""


@dataclass(eq=False)
class _Job:
    """A fetch in the making: pieces left to finish, what came of those done."""

    key: Key
    slot: int
    image: memoryview
    kind: str
    left: int
    urgent: bool
    nbytes: int = 0
    t0: float = float("inf")
    t1: float = 0.0
    error: BaseException | None = None
    cancelled: bool = False


class _Queue:
    """Pieces waiting for a worker. Workers hold this and not the transfer, so that it can be freed unclosed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.work, self.done = threading.Condition(self.lock), threading.Condition(self.lock)
        self.pieces: deque[tuple[_Job, int, int | None]] = deque()
        self.moved: Counter[str] = Counter()
        self.closed = False

    def take(self) -> tuple[_Job, int, int | None] | None:
        """The next piece, urgent ones first; sleeps while there is none, None once closed."""
        with self.lock:
            while not self.pieces and not self.closed:
                self.work.wait()
            if self.closed:
                return None
            at = next((i for i, (job, _, _) in enumerate(self.pieces) if job.urgent), 0)
            piece = self.pieces[at]
            del self.pieces[at]
            return piece

    def finish(self, job: _Job, nbytes: int, t0: float, error: BaseException | None) -> None:
        """A piece of `job` is done."""
        with self.lock:
            job.nbytes, job.left = job.nbytes + nbytes, job.left - 1
            job.t0, job.t1 = min(job.t0, t0), max(job.t1, time.perf_counter())
            job.error = job.error or error
            self.moved[job.kind] += nbytes
            if job.left == 0:
                self.done.notify_all()

    def drop(self, job: _Job) -> None:
        """Forget the pieces of `job` that no worker has begun; the lock is held."""
        kept = [piece for piece in self.pieces if piece[0] is not job]
        job.left -= len(self.pieces) - len(kept)
        self.pieces = deque(kept)
        if job.left == 0:
            self.done.notify_all()

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.pieces.clear()
            self.work.notify_all()


def _work(queue: _Queue, reader: Reader) -> None:
    """A worker: reads pieces until the queue closes, and holds nothing of the arena while it sleeps."""
    while (piece := queue.take()) is not None:
        _read_piece(queue, reader, *piece)
        del piece


def _read_piece(queue: _Queue, reader: Reader, job: _Job, start: int, stop: int | None) -> None:
    """Read one piece, or nothing where another one of the same expert failed; an error is left to the waiter."""
    nbytes, t0, error = 0, time.perf_counter(), None
    try:
        if not job.error:
            part = () if stop is None else (start, stop)
            nbytes = reader.read_into(*job.key, job.image, *part)
    except Exception as e:
        error = e
    queue.finish(job, nbytes, t0, error)


class ThreadTransfer:
    """Worker threads that read with the GIL released; a long expert is read in pieces, several at a time.

    images: memory of each slot. sizes: bytes of an expert, by site. workers: 0 reads within `fetch` itself.
    """

    def __init__(self, reader: Reader, images: Sequence[memoryview], sizes: Sequence[int], workers: int) -> None:
        self.reader, self.images, self.sizes = reader, images, sizes
        self.queue, self.jobs = _Queue(), {}
        self.threads = [
            threading.Thread(target=_work, args=(self.queue, reader), name=f"mixoff-read-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self.threads:
            thread.start()
        weakref.finalize(self, self.queue.close)

    def enter(self) -> None:
        """Nothing to do: what has landed is there for every thread."""

    def fetch(self, key: Key, slot: int, kind: str = MISS) -> None:
        """Queue the pieces of an expert; where a cancelled fetch still writes to the slot, after that has ended."""
        self._settle(slot)
        pieces = self._pieces(key[0])
        job = self.jobs[slot] = _Job(key, slot, self.images[slot], kind, len(pieces), kind != PREFETCH)
        if not self.threads:
            return _read_piece(self.queue, self.reader, job, *pieces[0])
        with self.queue.lock:
            self.queue.pieces.extend((job, start, stop) for start, stop in pieces)
            self.queue.work.notify(len(pieces))

    def wait(self, slots: Collection[int]) -> Landing:
        """Sleep until the first of `slots` is filled; raises OSError or CheckpointError of a failed read."""
        jobs, queue = [self.jobs[slot] for slot in slots], self.queue
        with queue.lock:
            for job in jobs:
                job.urgent = True
            while (job := next((job for job in jobs if job.left == 0), None)) is None:
                queue.done.wait()
        del self.jobs[job.slot]
        if job.error:
            raise job.error
        return Landing(job.slot, job.nbytes, job.t0, job.t1)

    def release(self, slot: int) -> None:
        """Nothing to do: on a CPU a computation is over when it returns."""

    def cancel(self, slot: int) -> Landing | None:
        """Drop what was not begun; what is being read ends on its own, before the slot is filled again."""
        if (job := self.jobs.get(slot)) is None:
            return None
        with self.queue.lock:
            job.cancelled = True
            self.queue.drop(job)
            return Landing(slot, job.nbytes, job.t0, job.t1) if job.nbytes else None

    def near(self, key: Key) -> bool:
        """Never: every fetch asks the reader."""
        return False

    def counts(self) -> Counter[str]:
        """Bytes by kind of fetch."""
        with self.queue.lock:
            return self.queue.moved.copy()

    def reseat(self, slots: Sequence[memoryview]) -> None:
        """Other memory from now on, once nothing writes to what was."""
        for slot in list(self.jobs):
            self.cancel(slot)
            self._settle(slot)
        self.images = slots

    def close(self) -> None:
        """End the workers; a piece that is being read is waited for."""
        self.queue.close()
        for thread in self.threads:
            thread.join()
        self.jobs, self.images = {}, []

    def _settle(self, slot: int) -> None:
        """Wait until nothing writes to `slot`."""
        if job := self.jobs.pop(slot, None):
            assert job.cancelled, "a slot takes one fetch at a time"
            with self.queue.lock:
                while job.left:
                    self.queue.done.wait()

    def _pieces(self, site: int) -> list[tuple[int, int | None]]:
        """Ranges of an expert's image that one request each reads; `(0, None)` is all of it."""
        size, step = self.sizes[site], getattr(self.reader, "piece_nbytes", None)  # a reader of memory has none
        if not self.threads or not step or size <= step:
            return [(0, None)]
        return [(start, min(start + step, size)) for start in range(0, size, step)]

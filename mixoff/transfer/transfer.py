"""Moves experts into slots in the background, and reports when their bytes have arrived.

A `Transfer` fills a slot between `fetch` and the `wait` that reports it. After computing from a slot the caller calls
`release`, and only then may the slot be fetched into again. On a CPU, worker threads read, and `release` does nothing.
On a GPU (`streams`), products wait for the copy's event, and the next copy waits for the event that `release` records.
Tests run the runtime under a third transfer, which delivers late and out of order, and poisons slots until then.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

from mixoff.cache.events import MISS, PREFETCH, Key, Landing
from mixoff.store.readers import Reader


class Transfer(Protocol):
    """Fills slots of the fast tier. Called by one thread at a time."""

    def enter(self) -> None:
        """A call of a layer begins on this thread: it may use everything that has landed so far."""

    def fetch(self, key: Key, slot: int, kind: str = MISS) -> int:
        """Begin to fill `slot` with the expert `key`. kind: as in `cache.Grant`, or `prefetch`, which comes last.

        Returns the slot that is filled: a transfer may exchange `slot` for a spare one of its own.
        """

    def wait(self, slots: Collection[int]) -> Landing:
        """Sleep until the fetch into one of `slots` is done, and report it once. Raises the error of a failed fetch."""

    def release(self, slot: int) -> None:
        """All products from `slot` are computed (queued, on a device): it may be fetched into."""

    def cancel(self, slot: int) -> Landing | None:
        """Give up the fetch into `slot`, whose content is undefined until the next fetch into it.

        Returns what had arrived, None if nothing had.
        """

    def near(self, key: Key) -> bool:
        """Whether fetching `key` is only a copy in RAM, which a guess could not hide."""

    def counts(self) -> Counter[str]:
        """Bytes so far by kind of fetch. `ram`: the part of them from a RAM tier, in `ram_hits` fetches."""

    def stop(self) -> None:
        """Give up every fetch and forget what the slots hold; sleeps until nothing writes to a slot.

        Works from any state that an interrupted call left behind, including an interrupted `stop`.
        """

    def reseat(self, slots: Sequence, spares: Sequence[int] = ()) -> None:
        """`stop`, then fill these slots from now on; an empty sequence releases the old ones' memory.

        spares: slots for `fetch` to exchange; only a device's transfer does
        """

    def forked(self) -> None:
        """Called in the child of a fork, where the threads do not exist. `stop` comes before any fetch."""

    def close(self) -> None:
        """End the fetches. Slots may be freed afterwards."""


@dataclass(eq=False)
class _Job:
    """A fetch in progress: the pieces left, and the results of those done."""

    key: Key
    slot: int
    image: memoryview
    kind: str
    left: int
    urgent: bool
    nbytes: int = 0
    t0: float = float("inf")
    t1: float = 0.0
    error: Exception | None = None
    cancelled: bool = False

    def finish(self, nbytes: int, t0: float, error: Exception | None) -> None:
        """A piece is done. `left` changes last: a thread that sees 0 sees the other fields as well."""
        self.nbytes += nbytes
        self.t0, self.t1 = min(self.t0, t0), max(self.t1, time.perf_counter())
        self.error = self.error or error
        self.left -= 1


class _Queue:
    """Pieces for the workers to read. Workers reference this and not the transfer, so that it can be freed unclosed.

    `work` and `done` carry tokens that mean "check again"; the state itself is in `pieces` and `_Job.left`. So an extra
    token, or one that an interrupt lost, changes nothing, and a waiting thread is inside one call of C code.
    `threading.Condition` guarantees less: interrupted in its `wait`, it may leave its lock released.
    """

    def __init__(self) -> None:
        self.moved: Counter[str] = Counter()
        self.closed = False
        self.reset()

    def reset(self) -> None:
        """Start empty, with new locks: after a fork, threads of the parent may hold the old ones."""
        self.lock = threading.Lock()
        self.work: SimpleQueue[None] = SimpleQueue()
        self.done: SimpleQueue[None] = SimpleQueue()
        self.pieces: deque[tuple[_Job, int, int | None]] = deque()
        self.reading = 0  # pieces that workers are reading now

    def put(self, job: _Job, pieces: Sequence[tuple[int, int | None]]) -> None:
        """Queue the pieces of `job`."""
        with self.lock:
            self.pieces.extend((job, start, stop) for start, stop in pieces)
        for _ in pieces:
            self.work.put(None)

    def take(self) -> tuple[_Job, int, int | None] | None:
        """The next piece, urgent ones first; sleeps while there is none; None once closed."""
        while True:
            self.work.get()
            with self.lock:
                if self.closed:
                    self.work.put(None)  # for the next worker
                    return None
                if self.pieces:
                    at = next((i for i, (job, _, _) in enumerate(self.pieces) if job.urgent), 0)
                    piece = self.pieces[at]
                    del self.pieces[at]
                    self.reading += 1
                    return piece

    def finish(self, job: _Job, nbytes: int, t0: float, error: Exception | None) -> None:
        """A worker is done with a piece of `job`."""
        with self.lock:
            self.moved[job.kind] += nbytes
            self.reading -= 1
            job.finish(nbytes, t0, error)
            if job.left == 0 or self.reading == 0:
                self.done.put(None)

    def drop(self, job: _Job) -> None:
        """Forget the pieces of `job` that no worker has begun."""
        with self.lock:
            kept = deque(piece for piece in self.pieces if piece[0] is not job)
            job.left -= len(self.pieces) - len(kept)
            self.pieces = kept

    def clear(self) -> None:
        """Forget all pieces that no worker has begun, and sleep until no worker is reading."""
        with self.lock:
            self.pieces.clear()
        self.sleep_until(lambda: not self.reading)

    def sleep_until(self, look: Callable[[], Any]) -> Any:
        """Sleep until `look()` is true, which a worker that finishes may change; returns its value."""
        while True:
            while not self.done.empty():
                self.done.get_nowait()  # drained before `look`, so that no later change is missed
            if value := look():
                return value
            self.done.get()

    def close(self) -> None:
        self.closed = True
        self.work.put(None)


def _work(queue: _Queue, reader: Reader) -> None:
    """A worker: reads pieces until the queue closes; references nothing of the arena while it sleeps."""
    while (piece := queue.take()) is not None:
        t0 = time.perf_counter()
        nbytes, error = _read(reader, *piece)
        queue.finish(piece[0], nbytes, t0, error)
        del piece, error


def _read(reader: Reader, job: _Job, start: int, stop: int | None) -> tuple[int, Exception | None]:
    """Read one piece, or nothing if another piece of the expert failed; `wait` raises the error."""
    try:
        part = () if stop is None else (start, stop)
        return 0 if job.error else reader.read_into(*job.key, job.image, *part), None
    except Exception as error:
        return 0, error


class ThreadTransfer:
    """Worker threads that read with the GIL released; a large expert is read in several pieces at a time.

    images: memory of each slot
    sizes: bytes of an expert, by site
    workers: number of threads; 0 reads inside `fetch`
    """

    def __init__(self, reader: Reader, images: Sequence[memoryview], sizes: Sequence[int], workers: int) -> None:
        self.reader, self.images, self.sizes, self.workers = reader, images, sizes, workers
        self.queue = _Queue()
        self.jobs: dict[int, _Job] = {}
        self.threads: list[threading.Thread] = []
        self._start()
        weakref.finalize(self, self.queue.close)

    def enter(self) -> None:
        """Nothing to do: every thread sees what has landed."""

    def fetch(self, key: Key, slot: int, kind: str = MISS) -> int:
        """Queue the pieces of an expert, once no cancelled fetch writes to the slot."""
        self._settle(slot)
        pieces = self._pieces(key[0])
        job = self.jobs[slot] = _Job(key, slot, self.images[slot], kind, len(pieces), kind != PREFETCH)
        if self.workers:
            self.queue.put(job, pieces)
        else:
            self._read_now(job)
        return slot

    def wait(self, slots: Collection[int]) -> Landing:
        """Sleep until the first of `slots` is filled; raises the OSError or CheckpointError of a failed read."""
        if len(self.threads) < self.workers:
            raise RuntimeError("this process was forked in the middle of a call: its threads stayed with the parent")
        jobs = [self.jobs[slot] for slot in slots]
        for job in jobs:
            job.urgent = True
        job = self.queue.sleep_until(lambda: next((job for job in jobs if job.left == 0), None))
        del self.jobs[job.slot]
        if job.error:
            raise job.error
        return Landing(job.slot, job.nbytes, job.t0, job.t1)

    def release(self, slot: int) -> None:
        """Nothing to do: on a CPU a computation is over when it returns."""

    def cancel(self, slot: int) -> Landing | None:
        """Drop pieces that no worker has begun; the others end before the slot is filled again."""
        if (job := self.jobs.get(slot)) is None:
            return None
        job.cancelled = True
        self.queue.drop(job)
        return Landing(slot, job.nbytes, job.t0, job.t1) if job.nbytes else None

    def near(self, key: Key) -> bool:
        """Always False: every fetch asks the reader."""
        return False

    def counts(self) -> Counter[str]:
        """Bytes by kind of fetch."""
        with self.queue.lock:
            return self.queue.moved.copy()

    def stop(self) -> None:
        """Forget every fetch, once no worker is writing; after a fork, this starts new workers."""
        self.queue.clear()
        self.jobs = {}
        self._start()

    def reseat(self, slots: Sequence[memoryview], spares: Sequence[int] = ()) -> None:
        """Use other memory from now on, once nothing writes to the old one."""
        self.stop()
        self.images = slots

    def forked(self) -> None:
        """Forget the parent's workers and their reads."""
        self.threads = []
        self.queue.reset()

    def close(self) -> None:
        """End the workers, after the pieces they are reading."""
        self.queue.close()
        for thread in self.threads:
            thread.join()
        self.jobs, self.images = {}, []

    def _start(self) -> None:
        while len(self.threads) < self.workers:
            name = f"mixoff-read-{len(self.threads)}"
            thread = threading.Thread(target=_work, args=(self.queue, self.reader), name=name, daemon=True)
            thread.start()
            self.threads.append(thread)

    def _read_now(self, job: _Job) -> None:
        """Read an expert on this thread. `wait` raises an error, except a guess's: it may never be waited for."""
        t0 = time.perf_counter()
        nbytes, error = _read(self.reader, job, 0, None)
        if error and job.kind == PREFETCH:  # it would be lost otherwise, and may come from a signal handler
            raise error
        self.queue.moved[job.kind] += nbytes
        job.finish(nbytes, t0, error)

    def _settle(self, slot: int) -> None:
        """Sleep until nothing writes to `slot`."""
        if job := self.jobs.get(slot):
            assert job.cancelled, "a slot takes one fetch at a time"
            self.queue.sleep_until(lambda: job.left == 0)
            del self.jobs[slot]

    def _pieces(self, site: int) -> list[tuple[int, int | None]]:
        """Ranges of an expert's image that one request each reads; `(0, None)` is all of it."""
        size, step = self.sizes[site], getattr(self.reader, "piece_nbytes", None)  # a reader of memory has none
        if not self.workers or not step or size <= step:
            return [(0, None)]
        return [(start, min(start + step, size)) for start in range(0, size, step)]

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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

from mixoff.cache.events import MISS, PREFETCH, Key, Landing
from mixoff.store.readers import Reader


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

    def stop(self) -> None:
        """Give up every fetch and forget what the slots hold; sleeps until nothing is written to a slot any more.

        Works from whatever state an interrupted call left behind, and again if it is interrupted itself.
        """

    def reseat(self, slots: Sequence) -> None:
        """`stop`, then fill these slots from now on; none lets go of memory."""

    def forked(self) -> None:
        """This process is the child of a fork: the threads stayed with the parent. `stop` comes before any fetch."""

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
    error: Exception | None = None
    cancelled: bool = False

    def finish(self, nbytes: int, t0: float, error: Exception | None) -> None:
        """A piece is done. `left` comes last: whoever sees none left sees the rest as well."""
        self.nbytes += nbytes
        self.t0, self.t1 = min(self.t0, t0), max(self.t1, time.perf_counter())
        self.error = self.error or error
        self.left -= 1


class _Queue:
    """Pieces for the workers to read. Workers hold this and not the transfer, so that it can be freed unclosed.

    `work` and `done` carry tokens that say "look again": what there is to read or to report is in `pieces` and in
    `_Job.left`. So a token too many, or one that an interrupt lost, changes nothing, and a thread that waits is inside
    one call of C code. `threading.Condition` promises less: interrupted in its `wait`, it may leave its lock released.
    """

    def __init__(self) -> None:
        self.moved: Counter[str] = Counter()
        self.closed = False
        self.reset()

    def reset(self) -> None:
        """Begin with nothing to read, and with new locks: after a fork, threads of the parent may hold the old ones."""
        self.lock = threading.Lock()
        self.work: SimpleQueue[None] = SimpleQueue()
        self.done: SimpleQueue[None] = SimpleQueue()
        self.pieces: deque[tuple[_Job, int, int | None]] = deque()
        self.reading = 0  # pieces that workers are reading now

    def put(self, job: _Job, pieces: Sequence[tuple[int, int | None]]) -> None:
        """Have the pieces of `job` read."""
        with self.lock:
            self.pieces.extend((job, start, stop) for start, stop in pieces)
        for _ in pieces:
            self.work.put(None)

    def take(self) -> tuple[_Job, int, int | None] | None:
        """The next piece, urgent ones first; sleeps while there is none, None once closed."""
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
        """Forget all pieces that no worker has begun, and sleep until no worker reads any more."""
        with self.lock:
            self.pieces.clear()
        self.sleep_until(lambda: not self.reading)

    def sleep_until(self, look: Callable[[], Any]) -> Any:
        """Sleep until `look()`, which workers can change by finishing, is true; returns its value."""
        while True:
            while not self.done.empty():
                self.done.get_nowait()  # what it tells of, `look` is about to see
            if value := look():
                return value
            self.done.get()

    def close(self) -> None:
        self.closed = True
        self.work.put(None)


def _work(queue: _Queue, reader: Reader) -> None:
    """A worker: reads pieces until the queue closes, and holds nothing of the arena while it sleeps."""
    while (piece := queue.take()) is not None:
        t0 = time.perf_counter()
        nbytes, error = _read(reader, *piece)
        queue.finish(piece[0], nbytes, t0, error)
        del piece, error


def _read(reader: Reader, job: _Job, start: int, stop: int | None) -> tuple[int, Exception | None]:
    """Read one piece, or nothing where another one of the same expert failed; an error is left to the waiter."""
    try:
        part = () if stop is None else (start, stop)
        return 0 if job.error else reader.read_into(*job.key, job.image, *part), None
    except Exception as error:
        return 0, error


class ThreadTransfer:
    """Worker threads that read with the GIL released; a long expert is read in pieces, several at a time.

    images: memory of each slot. sizes: bytes of an expert, by site. workers: 0 reads within `fetch` itself.
    """

    def __init__(self, reader: Reader, images: Sequence[memoryview], sizes: Sequence[int], workers: int) -> None:
        self.reader, self.images, self.sizes, self.workers = reader, images, sizes, workers
        self.queue, self.jobs = _Queue(), {}
        self.threads: list[threading.Thread] = []
        self._start()
        weakref.finalize(self, self.queue.close)

    def enter(self) -> None:
        """Nothing to do: what has landed is there for every thread."""

    def fetch(self, key: Key, slot: int, kind: str = MISS) -> None:
        """Queue the pieces of an expert; where a cancelled fetch still writes to the slot, after that has ended."""
        self._settle(slot)
        pieces = self._pieces(key[0])
        job = self.jobs[slot] = _Job(key, slot, self.images[slot], kind, len(pieces), kind != PREFETCH)
        if self.workers:
            self.queue.put(job, pieces)
        else:
            self._read_now(job)

    def wait(self, slots: Collection[int]) -> Landing:
        """Sleep until the first of `slots` is filled; raises OSError or CheckpointError of a failed read."""
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
        """Drop what was not begun; what is being read ends on its own, before the slot is filled again."""
        if (job := self.jobs.get(slot)) is None:
            return None
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

    def stop(self) -> None:
        """Forget every fetch, once no worker writes any more; after a fork, workers begin to work here too."""
        self.queue.clear()
        self.jobs = {}
        self._start()

    def reseat(self, slots: Sequence[memoryview]) -> None:
        """Other memory from now on, once nothing writes to what was."""
        self.stop()
        self.images = slots

    def forked(self) -> None:
        """No worker came along, and no read will end."""
        self.threads = []
        self.queue.reset()

    def close(self) -> None:
        """End the workers; a piece that is being read is waited for."""
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
        """Read an expert on this thread. What goes wrong is for the waiter, but nobody may ever wait for a guess."""
        t0 = time.perf_counter()
        nbytes, error = _read(self.reader, job, 0, None)
        if error and job.kind == PREFETCH:  # or it would be lost, and it may be the exception of a signal handler
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

"""Threads that share one computation and sleep in between; the calling thread takes a share too.

numba's own threading layer is not used: it would end the process when two models compute at once.

PyTorch's own threads get in the way. Waking them for a one-token operation takes longer (0.4 ms here, measured) than
the operation itself, and those that spin instead of sleeping occupy the cores that the kernels need. So a pass over one
token can `borrow` them: PyTorch computes on one thread, our kernels on as many as it had.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import ModuleType

import numpy as np
import torch

PIECES = 16  # pieces of a job per thread: one that is late takes fewer
PATIENCE = 100_000  # looks of a helper for the next job before it sleeps


_loans: dict[int, int] = {}  # PyTorch's number of threads before, by borrowing thread


def count() -> int:
    """Threads that a kernel may use: PyTorch's number, or its number before this thread's `borrow`."""
    return _loans.get(threading.get_ident()) or torch.get_num_threads()


def borrow() -> None:
    """Have PyTorch compute on one thread, until this thread's `give_back`."""
    known = next(iter(list(_loans.values())), None)  # the first of several borrowers knows the number
    _loans[threading.get_ident()] = known or torch.get_num_threads()
    torch.set_num_threads(1)


def give_back() -> None:
    """End this thread's `borrow`, if there is one."""
    if threads := _loans.get(threading.get_ident()):
        torch.set_num_threads(threads)
        del _loans[threading.get_ident()]  # last: after an interrupt before it, `give_back` can be called again


def compute(stages: int, number: int, jobs: int, threads: int) -> None:
    """Run `number` stages of compiled functions on `threads` threads; stages and jobs are addresses, as in `relay`."""
    if threads == 1:
        _relay().alone(stages, number, jobs)
    else:
        crew(threads).compute(stages, number, jobs)


@functools.cache
def _relay() -> ModuleType:
    """The module that needs numba, imported with the first product."""
    from mixoff.kernels.cpu import relay

    return relay


class Crew:
    """`helpers` threads that sleep until there is work, or watch for the next compiled job (see `relay`)."""

    def __init__(self, helpers: int) -> None:
        self.jobs: list[SimpleQueue] = [SimpleQueue() for _ in range(helpers)]
        self.lock = threading.Lock()
        self.cells: tuple[np.ndarray, int] | None = None  # with their address, which takes longer to get than a lock
        for i, jobs in enumerate(self.jobs):
            threading.Thread(target=self._work, args=(jobs,), name=f"mixoff-kernel-{i}", daemon=True).start()

    def compute(self, stages: int, number: int, jobs: int) -> None:
        """The function `compute`; the caller computes alone while the helpers are busy for another thread."""
        relay = _relay()
        if self.lock.locked():
            relay.alone(stages, number, jobs)
            return
        with self.lock:  # `acquire(blocking=False)` and a `try` would leave a gap for an interrupt between them
            try:
                relay.share(self._wake(relay), stages, number, jobs)
            except BaseException:
                self.cells = None  # helpers that watch these will sleep; we do not wait for them
                raise

    def _wake(self, relay: ModuleType) -> int:
        """Wake the helpers that sleep; returns the address of the cells."""
        if self.cells is None:
            cells = np.zeros(relay.ASLEEP + relay.STEP * len(self.jobs), np.int64)
            cells[relay.ASLEEP :] = 1
            self.cells = cells, cells.ctypes.data
        cells, address = self.cells
        for i, queue in enumerate(self.jobs):
            if cells[relay.ASLEEP + relay.STEP * i]:
                cells[relay.ASLEEP + relay.STEP * i] = 0
                watch = functools.partial(_watch, cells, int(cells[relay.TICKET]))
                queue.put((watch, i, i, SimpleQueue()))
        return address

    def share(self, work: Callable[[int, int], object], count: int) -> None:
        """Call `work(first, last)` for one range of 0..count per thread, and wait for all.

        An error in any of them is raised here, after all have ended.
        """
        threads = len(self.jobs) + 1
        bounds = [count * i // threads for i in range(threads + 1)]
        done: SimpleQueue[BaseException | None] = SimpleQueue()
        for i, jobs in enumerate(self.jobs):
            jobs.put((work, bounds[i + 1], bounds[i + 2], done))
        errors = [_attempt(work, bounds[0], bounds[1]), *(done.get() for _ in self.jobs)]
        if error := next((error for error in errors if error is not None), None):
            raise error

    @staticmethod
    def _work(jobs: SimpleQueue) -> None:
        while True:
            work, first, last, done = jobs.get()
            done.put(_attempt(work, first, last))
            del work, done  # otherwise they would be kept alive until the next call


def _watch(cells: np.ndarray, seen: int, i: int, _: int) -> None:
    """As helper i, help until there is nothing to do for a while."""
    _relay().help_out(cells, i, seen, PATIENCE)


def _attempt(work: Callable[[int, int], object], first: int, last: int) -> BaseException | None:
    try:
        work(first, last)
    except BaseException as error:  # raised in the calling thread
        return error
    return None


@functools.cache
def crew(threads: int) -> Crew:
    """The crew of `threads` threads, the asking one included."""
    return Crew(threads - 1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=crew.cache_clear)  # threads do not survive a fork

"""Threads that share one computation and sleep in between; the thread that asks works along.

numba's own threading layer is not used: it would end the process when two models compute at once. Does not know what is
computed.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue


class Crew:
    """`helpers` threads that wait for work."""

    def __init__(self, helpers: int) -> None:
        self.jobs = [SimpleQueue() for _ in range(helpers)]
        for i, jobs in enumerate(self.jobs):
            threading.Thread(target=self._work, args=(jobs,), name=f"mixoff-kernel-{i}", daemon=True).start()

    def share(self, work: Callable[[int, int], object], count: int) -> None:
        """Call `work(first, last)` for as many ranges as there are threads, which together are 0..count; then return.

        An error in any of them is raised here, once all have ended.
        """
        threads = len(self.jobs) + 1
        bounds, done = [count * i // threads for i in range(threads + 1)], SimpleQueue()
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
            del work, done  # what they hold is not kept until the next call


def _attempt(work: Callable[[int, int], object], first: int, last: int) -> BaseException | None:
    try:
        work(first, last)
    except BaseException as error:  # it belongs to the thread that asked
        return error
    return None


@functools.cache
def crew(threads: int) -> Crew:
    """The crew of `threads` threads, the asking one included."""
    return Crew(threads - 1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=crew.cache_clear)  # threads do not survive a fork

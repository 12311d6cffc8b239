"""The live grid of experts: frames for those who watch, in the form that the course's widget draws.

Nobody listens to the runtime while nobody watches: a listener makes every expert a call of its own, which costs time.
A frame is a pass of the whole batch. At most MAX_FPS are sent per second, and always the last one.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from mixoff.cache.cells import Cells

if TYPE_CHECKING:
    from mixoff.cache.events import Event
    from mixoff.runtime.runtime import Runtime

MAX_FPS = 10
SHOWN = 60  # passes whose hits and misses are drawn as bars
BEAT_S = 15.0  # a comment is sent when nothing happens for so long, so that a watcher who is gone is noticed


class Grid:
    """Collects frames of `runtime` while somebody watches."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        sites = runtime.source.sites
        self.layers = [site.layer for site in sites]
        self.experts = max(site.num_experts for site in sites)
        self.ending = False
        self._watchers: set[asyncio.Event] = set()
        self._lock = threading.Lock()  # events come from the worker's thread
        self._stop: Callable[[], None] | None = None
        self._restart()

    def shape(self) -> dict[str, Any]:
        """What the widget must know first."""
        return {"layers": self.layers, "experts": self.experts}

    async def frames(self) -> AsyncGenerator[dict[str, Any] | None]:
        """The newest frame whenever there is one; None as a sign of life."""
        changed, sent = asyncio.Event(), -1
        self._join(changed)
        try:
            while not self.ending:
                if self._number != sent:
                    sent, frame = self._newest()
                    yield frame
                    await asyncio.sleep(1 / MAX_FPS)
                    continue
                changed.clear()
                try:
                    await asyncio.wait_for(changed.wait(), BEAT_S)
                except asyncio.TimeoutError:
                    yield None
        finally:
            self._leave(changed)

    def end(self) -> None:
        """Let all watchers go: the server is about to end."""
        self.ending = True
        self._wake()

    def _join(self, changed: asyncio.Event) -> None:
        self._watchers.add(changed)
        if self._stop is None:
            self._loop = asyncio.get_running_loop()
            self._restart()
            self._stop = self.runtime.on_event(self._note)

    def _leave(self, changed: asyncio.Event) -> None:
        self._watchers.discard(changed)
        if not self._watchers and self._stop is not None:
            self._stop()
            self._stop = None

    def _restart(self) -> None:
        """Begin with what is resident now; counts are those since somebody watches."""
        resident = self.runtime.resident()  # before our lock: events come while the runtime holds its own
        with self._lock:
            self._cells = Cells(self.layers, self.experts, resident)
            self._token: int | None = None
            self._number = self._passes = 0
            self._counts: list[tuple[int, int]] = []  # hits and misses of the newest passes
            self._counted = (0, 0)
            self._due = 0.0

    def _note(self, event: Event) -> None:
        """Take in an event, on the worker's thread."""
        with self._lock:
            if event.token != self._token:
                if self._token is not None:
                    self._end_pass()
                self._token = event.token
            if self._cells.note(event):
                self._number += 1
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + 1 / MAX_FPS
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody watches any more
                self._loop.call_soon_threadsafe(self._wake)

    def _end_pass(self) -> None:
        hits, misses, _, _ = self._cells.stats()
        counts = hits - self._counted[0], misses - self._counted[1]
        self._counts, self._counted = [*self._counts[1 - SHOWN :], counts], (hits, misses)
        self._passes += 1
        self._cells.end_pass()

    def _wake(self) -> None:
        for changed in self._watchers:
            changed.set()

    def _newest(self) -> tuple[int, dict[str, Any]]:
        with self._lock:
            cells = base64.b64encode(self._cells.frame()).decode("ascii")
            frame = {"token": self._passes, "stats": self._cells.stats(), "cells": cells, "words": []}
            return self._number, frame | {"counts": self._counts}

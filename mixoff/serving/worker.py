"""The only thread that runs the model: takes rows from a queue into a batcher, and gives them tokens until they end.

An exception in a pass is not the fault of every row in it. So the rows of that pass are tried one by one: one that
fails alone ends with its error, and the others go on where they were.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from mixoff.errors import MixoffError, one_line
from mixoff.serving.batcher import Batcher
from mixoff.serving.row import Row

LATELY_S = 10.0  # what "lately" means to /metrics
IDLE_S = 0.5  # longest sleep without looking for a stop
log = logging.getLogger("mixoff.serving")


class Full(MixoffError):
    """The queue has no room for a request. retry_s: seconds until it may have."""

    def __init__(self, message: str, retry_s: int) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class Stopping(MixoffError):
    """The server is about to end."""


@dataclass
class Counts:
    """What the worker has done since it began."""

    tokens: int = 0
    prompt_tokens: int = 0
    steps: int = 0
    failures: int = 0
    lately: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=500))  # times of passes, their tokens

    def add(self, tokens: int) -> None:
        """Note a pass that gave `tokens`."""
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        self.lately.append((time.perf_counter(), tokens))

    def tokens_per_s(self) -> float:
        """Tokens per second over the last LATELY_S."""
        since = time.perf_counter() - LATELY_S
        return sum(tokens for at, tokens in list(self.lately) if at > since) / LATELY_S


class Worker:
    """Runs rows on a batcher.

    Parameters
    ----------
    batcher: computes the tokens; used on the worker's thread alone
    most_rows: rows computed together
    most_waiting: rows that may wait; a request that would exceed it is refused
    """

    def __init__(self, batcher: Batcher, most_rows: int = 8, most_waiting: int = 64) -> None:
        self.batcher, self.most_rows, self.most_waiting = batcher, most_rows, most_waiting
        self.counts = Counts()
        self.running = 0
        self._waiting: deque[Row] = deque()
        self._alone: deque[Row] = deque()  # rows of a pass that failed, each to be tried without the others
        self._sound: list[Row] = []  # those of them that did not fail alone
        self._changed = threading.Condition()
        self.draining = self._ending = False
        self._pace_s = 1.0  # seconds that a row has lately taken from its first token to its end
        self._thread = threading.Thread(target=self._run, name="mixoff-worker", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the worker can still compute."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return sum(not row.cancelled for row in list(self._waiting))

    def submit(self, rows: Iterable[Row]) -> None:
        """Queue the rows of one request. Raises Full if they do not all fit, and Stopping if the server is ending."""
        rows, most = list(rows), self.most_rows + self.most_waiting
        if len(rows) > most:
            raise MixoffError(f"the request asks for {len(rows)} answers, and this server takes {most} at once")
        if any(row.score_prompt for row in rows) and not self.batcher.scores_prompts:
            raise MixoffError("this server does not score prompts (echo with logprobs): start it with --batcher rows")
        for row in rows:
            self.batcher.fits(row)  # raises for a row that never will
        with self._changed:
            if self.draining or not self.alive:
                raise Stopping("this server is about to end: ask again when it is back")
            free = self.most_rows - self.running + self.most_waiting - self.waiting
            if len(rows) > free:
                full = f"{self.running} answers are running and {self.waiting} are waiting"
                raise Full(f"{full}, the most that this server takes: ask again later", self._retry_s())
            self._waiting += rows
            self._changed.notify()

    def drain(self) -> None:
        """Refuse new requests, and end those that wait; rows that run go on."""
        with self._changed:
            self.draining = True
            waiting = [*self._waiting]
            self._waiting.clear()
        for row in waiting:
            row.fail(Stopping("this server ended before the request began: ask again when it is back"))

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End after the pass that runs now, with an error for what is unfinished; False if that takes too long."""
        self.drain()
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self.alive

    def _retry_s(self) -> int:
        """Seconds until a row that runs may end and make room."""
        return max(1, round(self._pace_s * (1 + self.waiting) / self.most_rows))

    # the worker's thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait():
            try:
                self._step()
            except Exception as error:
                self._failed(error)
        for row in (*self.batcher.clear(), *self._alone, *self._sound):
            row.fail(Stopping("this server ended before the answer did: ask again when it is back"))
        self.batcher.close()

    def _wait(self) -> bool:
        """Sleep until there is work; False when the worker must end."""
        with self._changed:
            while not (self._ending or self._waiting or self._alone or self._sound or self.batcher.rows):
                self._changed.wait(IDLE_S)
            return not self._ending

    def _step(self) -> None:
        """Let rows join, and compute one token of each that runs."""
        if self._alone:
            self._try_alone()
            return
        self.batcher.join(self._sound)
        self._sound = []
        self._admit()
        self._compute()

    def _try_alone(self) -> None:
        """One token for a row of a pass that failed; if that works, it joins the others when all have been tried."""
        self.batcher.join([self._alone.popleft()])
        self._compute()
        self._sound += self.batcher.clear()

    def _compute(self) -> None:
        rows = self.batcher.rows
        before, start = sum(row.count for row in rows), time.perf_counter()
        self.batcher.step()
        self.counts.add(sum(row.count for row in rows) - before)
        self._note_pace(rows, time.perf_counter() - start)

    def _admit(self) -> None:
        """Let rows that wait join, first come first served, while there is room."""
        with self._changed:
            self.running = sum(not row.ended for row in self.batcher.rows)
            while self._waiting and self.running < self.most_rows:
                if not (row := self._waiting[0]).ended:
                    if not self.batcher.fits(row):
                        return
                    self.batcher.join([row])
                    self.counts.prompt_tokens += len(row.prompt)
                    self.running += 1
                self._waiting.popleft()

    def _failed(self, error: Exception) -> None:
        """After a pass that failed: end its only row, or try its rows one by one."""
        log.warning("a pass failed: %s: %s", type(error).__name__, one_line(error))
        self.counts.failures += 1
        rows = self.batcher.clear()
        if len(rows) == 1:
            rows[0].fail(error)
        else:
            self._alone += rows
        self.running = len(self._alone) + len(self._sound)

    def _note_pace(self, rows: list[Row], step_s: float) -> None:
        ended = [row.count for row in rows if row.reason is not None]
        if ended:
            self._pace_s += 0.2 * (step_s * sum(ended) / len(ended) - self._pace_s)
        held = (*self.batcher.rows, *self._alone, *self._sound)
        self.running = sum(row.reason is None for row in held)

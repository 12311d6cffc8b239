"""The rows of one request on the event loop: news from the worker's thread, until every row has ended or nobody waits.

A reader who is slow, or gone, never holds the worker: news queue up, at most one per token of the context.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from mixoff.serving.row import FAILED, News, Row


class RowFailed(Exception):
    """A row ended with an error, which is the cause."""


@dataclass
class Answers:
    """News of `rows`, each with the number of its row. watch: gets (seconds, whether it is a row's first) per token."""

    rows: list[Row]
    watch: Callable[[float, bool], None] = lambda seconds, first: None
    _news: asyncio.Queue[tuple[int, News]] = field(default_factory=asyncio.Queue)

    def listen(self) -> None:
        """Have the rows tell their news here; call it on the event loop."""
        loop = asyncio.get_running_loop()
        for index, row in enumerate(self.rows):
            row.listener = self._listener(index, loop)

    def _listener(self, index: int, loop: asyncio.AbstractEventLoop) -> Callable[[News], None]:
        def hear(news: News) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
                loop.call_soon_threadsafe(self._news.put_nowait, (index, news))

        return hear

    def say(self, index: int, news: News) -> None:
        """Add news that the row does not have, such as the text of its prompt."""
        self._news.put_nowait((index, news))

    def cancel(self) -> None:
        """End all rows before their next token."""
        for row in self.rows:
            row.cancelled = True

    async def __aiter__(self) -> AsyncIterator[tuple[int, News]]:
        """All news, until the last row has ended. Raises RowFailed."""
        left, times = len(self.rows), [time.perf_counter()] * len(self.rows)
        seen = [0] * len(self.rows)
        while left:
            index, news = await self._news.get()
            if news.reason == FAILED:
                raise RowFailed from news.error
            if news.tokens:
                now = time.perf_counter()
                self.watch(now - times[index], not seen[index])
                times[index], seen[index] = now, seen[index] + len(news.tokens)
            left -= news.reason is not None
            yield index, news

    async def whole(self) -> list[News]:
        """The whole answer of each row. Raises RowFailed."""
        answers = [News() for _ in self.rows]
        async for index, news in self:
            answer = answers[index]
            answer.text += news.text
            answer.tokens += news.tokens
            answer.logprobs += news.logprobs
            answer.reason = news.reason
        return answers

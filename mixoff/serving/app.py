"""The endpoints: OpenAI's models, chats and completions, next to `/health`, `/metrics` and a page to look at.

Knows HTTP and nothing of batches: a request becomes rows, the worker gets them, and their news become replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException

from mixoff.errors import CheckpointError, MixoffError, one_line
from mixoff.pages import out_of_memory
from mixoff.serving import page, replies
from mixoff.serving.answer import Answers, RowFailed
from mixoff.serving.fields import Asked, ChatAsked, TextAsked
from mixoff.serving.grid import Grid
from mixoff.serving.metrics import Metrics
from mixoff.serving.replies import ChatReply, Reply, TextReply
from mixoff.serving.row import News, Row
from mixoff.serving.served import Served
from mixoff.serving.worker import Full, Stopping, Worker

GONE = 499  # nginx's status for a client that went away; nobody reads it, but it is counted
FOLDERS = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:)?(?:[\\/][^\\/\s'\":,;]+)*[\\/](?=[^\\/\s'\":,;])")
NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass
class Service:
    """What the endpoints share."""

    served: Served
    worker: Worker
    metrics: Metrics
    grid: Grid

    @classmethod
    def of(cls, served: Served, worker: Worker) -> Service:
        """A service with metrics and grid of its own."""
        runtime = served.model.mixoff
        return cls(served, worker, Metrics(worker, runtime), Grid(runtime))

    async def rows(self, make: Callable[[Any], list[Row]], asked: Asked) -> Answers:
        """Queue the rows of a request."""
        self.check_model(asked.model)
        rows = await asyncio.to_thread(make, asked)  # templates and tokenizers may take a while
        answers = Answers(rows, self.metrics.watch)
        answers.listen()
        if getattr(asked, "echo", False):
            for index, row in enumerate(rows):
                answers.say(index, News(text=row.prompt_text))
        self.worker.submit(rows)
        return answers

    async def reply(self, request: Request, asked: Asked, answers: Answers, reply: Reply) -> Response:
        """The whole reply, or a stream of its pieces."""
        if asked.stream:
            return Stream(answers, _events(answers, reply, asked.n or 1))
        try:
            whole = await _unless_gone(request, answers.whole())
        finally:
            answers.cancel()
        return JSONResponse(reply.whole(whole, replies.usage(answers.rows, asked.n or 1)))

    def check_model(self, name: str) -> None:
        """Raise an error for another model than the one that is served."""
        if name != self.served.name:
            raise HTTPException(404, f"this server has no model {name[:200]!r}: it serves {self.served.name!r}")

    def head(self, asked: Asked) -> dict[str, Any]:
        """What every reply begins with."""
        options = asked.stream_options
        return {
            "model": self.served.name,
            "spell": self.served.spell,
            "include_usage": bool(options and options.include_usage),
        }


def create_app(service: Service) -> FastAPI:
    """The application; `service.worker` must be started for requests to be answered."""
    app = FastAPI(title="mixoff", docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_openai(app, service)
    _add_state(app, service)
    _add_page(app, service.grid)
    return app


def _add_openai(app: FastAPI, service: Service) -> None:
    served, created = service.served, int(time.time())

    @app.get("/v1/models")
    def models() -> dict:
        return replies.models(served.name, served.context, created)

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict:
        service.check_model(name)
        return replies.models(served.name, served.context, created)["data"][0]

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: ChatAsked) -> Response:
        answers = await service.rows(served.chat_rows, asked)
        return await service.reply(request, asked, answers, ChatReply(**service.head(asked)))

    @app.post("/v1/completions")
    async def text(request: Request, asked: TextAsked) -> Response:
        answers = await service.rows(served.text_rows, asked)
        return await service.reply(request, asked, answers, TextReply(**service.head(asked)))


def _add_state(app: FastAPI, service: Service) -> None:
    worker = service.worker

    @app.get("/health")
    def health() -> Response:
        status = "ok" if worker.alive and not worker.draining else "ending" if worker.alive else "error"
        state = {"status": status, "model": service.served.name, "running": worker.running, "waiting": worker.waiting}
        return JSONResponse(state, 200 if status == "ok" else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI, grid: Grid) -> None:
    def add(path: str) -> None:
        @app.get(path)
        def file() -> Response:
            media_type, text = page.read(path)
            return Response(text, headers=page.HEADERS, media_type=media_type)

    for path in page.FILES:
        add(path)

    @app.get("/grid")
    def watch() -> Response:
        return StreamingResponse(_frames(grid), headers=NO_CACHE, media_type="text/event-stream")


async def _frames(grid: Grid) -> AsyncIterator[str]:
    yield _event(grid.shape())
    async with aclosing(grid.frames()) as frames:
        async for frame in frames:
            yield ": nothing new\n\n" if frame is None else _event(frame)


class Stream(StreamingResponse):
    """Server-sent events; the rows end when nobody reads any more, wherever the stream was."""

    def __init__(self, answers: Answers, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers=NO_CACHE, media_type="text/event-stream")
        self.answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.cancel()


async def _events(answers: Answers, reply: Reply, n: int) -> AsyncIterator[str]:
    try:
        for index in range(len(answers.rows)):
            if first := reply.first(index):
                yield _event(reply.piece([first]))
        async for index, news in answers:
            for choice in reply.deltas(index, news):
                yield _event(reply.piece([choice]))
        if reply.include_usage:
            yield _event(reply.piece([], replies.usage(answers.rows, n)))
        yield "data: [DONE]\n\n"
    except RowFailed as failure:
        status, message = _explain(failure.__cause__)
        yield _event(replies.error(message, status))


def _event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, unless the client goes away first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(GONE, "the client went away")
        return task.result()
    finally:
        for waiting in (task, gone):
            waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# Errors ---------------------------------------------------------------------------------------------------------------


def _explain(error: BaseException | None) -> tuple[int, str]:
    """Status and message for an error of a row, without the server's folders: the log has all of it."""
    if isinstance(error, Stopping):
        return 503, str(error)
    if isinstance(error, OSError | CheckpointError):
        reason = getattr(error, "strerror", None) or "they are damaged or incomplete"
        return 500, f"the model's files cannot be read ({one_line(reason)}): the server's log says more"
    if isinstance(error, MixoffError):
        return 500, _without_folders(one_line(error))
    if isinstance(error, Exception) and (why := out_of_memory(error)):
        return 503, f"memory ran out ({one_line(why)}): ask for less, or again later"
    return 500, _without_folders(f"{type(error).__name__}: {one_line(error)}")


def _without_folders(text: str) -> str:
    """`text` with only the last part of each absolute path.

    >>> _without_folders("no kernel in /home/ada/.cache/a.so: build it")
    'no kernel in a.so: build it'
    """
    return FOLDERS.sub("", text)


def _add_errors(app: FastAPI) -> None:
    handlers: dict[type[Exception], Callable[[Any], Response]] = {
        RequestValidationError: _invalid,
        StarletteHTTPException: lambda error: _error(str(error.detail), error.status_code, error.headers),
        Full: lambda error: _error(str(error), 429, {"Retry-After": str(error.retry_s)}),
        Stopping: lambda error: _error(str(error), 503, {"Retry-After": "5"}),
        MixoffError: lambda error: _error(one_line(error), 400),
        RowFailed: lambda error: _error(_explain(error.__cause__)[1], _explain(error.__cause__)[0]),
    }
    for kind, answer in handlers.items():
        app.add_exception_handler(kind, _handler(answer))


def _handler(answer: Callable[[Any], Response]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(_: Request, error: Exception) -> Response:
        return answer(error)

    return handle


def _error(message: str, status: int, headers: Any = None, param: str | None = None) -> Response:
    code = "model_not_found" if status == 404 and "no model" in message else None
    return JSONResponse(replies.error(message, status, param, code), status, headers)


def _invalid(error: RequestValidationError) -> Response:
    """The first fault that pydantic found, in one line."""
    first = error.errors()[0]
    places = [str(place) for place in first["loc"] if place != "body"]
    where = ".".join(place[:100] for place in places[:4]) if first["type"] != "json_invalid" else ""
    message = one_line(first["msg"].removeprefix("Value error, "))
    return _error(f"{where}: {message}" if where else message, 400, param=where or None)

"""Runs the application: loads the model, listens, and ends as a service should.

The first SIGTERM or Ctrl-C refuses new requests and lets those that run finish, for `grace_s` at most. A second Ctrl-C
ends at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mixoff.serving.app import Service, create_app
from mixoff.serving.batcher import Batcher
from mixoff.serving.guard import Guard
from mixoff.serving.metrics import Counted
from mixoff.serving.rows import RowsBatcher
from mixoff.serving.served import Served
from mixoff.serving.worker import Worker

if TYPE_CHECKING:
    from types import FrameType

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_CONNECTIONS = 1024
BATCHERS = ("rows", "paged")


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    rows: answers computed together
    waiting: answers that may wait for them
    kv_tokens: tokens whose keys and values the paged batcher holds; 0 is enough for `rows` full contexts
    body_nbytes, body_s: largest body of a request, and seconds that it may take to arrive
    grace_s: seconds for running answers to finish once the server is told to end
    """

    rows: int = 8
    waiting: int = 64
    kv_tokens: int = 0
    body_nbytes: int = 4 << 20
    body_s: float = 30.0
    grace_s: float = 30.0


LIMITS = Limits()


def make_batcher(kind: str, served: Served, limits: Limits) -> Batcher:
    """The batcher called `kind`, one of BATCHERS."""
    if kind == "rows":
        return RowsBatcher(served.model)
    from mixoff.serving.paged import PagedBatcher

    return PagedBatcher(served.model, limits.rows, served.context, limits.kv_tokens)


def make_app(service: Service, limits: Limits, api_key: str | None = None, hosts: tuple[str, ...] = ()) -> FastAPI:
    """The application behind its guards. hosts: names that requests may use; empty is any."""
    app = create_app(service)
    app.router.lifespan_context = _lifespan(service.worker)
    app.add_middleware(Guard, api_key=api_key, most_nbytes=limits.body_nbytes, body_s=limits.body_s)
    app.add_middleware(Counted, metrics=service.metrics)
    if hosts:  # a page of another site could otherwise reach a server without a key through a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*hosts], www_redirect=False)
    return app


def _lifespan(worker: Worker) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    return lifespan


class Server(uvicorn.Server):
    """uvicorn's server, which tells the worker at once when a signal asks it to end."""

    def __init__(
        self, config: uvicorn.Config, service: Service, grace_s: float, on_ready: Callable[[int], None]
    ) -> None:
        super().__init__(config)
        self.service, self.grace_s, self.on_ready = service, grace_s, on_ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Answer a signal: finish what runs, within the grace; a second Ctrl-C ends at once."""
        super().handle_exit(sig, frame)
        if self.force_exit:
            os._exit(130)  # the worker may be inside a pass, which nothing else ends
        self.service.worker.drain()
        self.service.grid.end()
        # rows that are late end with an error that their clients can read
        late = threading.Timer(self.grace_s, self.service.worker.stop)
        late.daemon = True
        late.start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self.on_ready(self.servers[0].sockets[0].getsockname()[1])


def serve(
    served: Served,
    listening: socket.socket,
    *,
    batcher: str = "rows",
    api_key: str | None = None,
    limits: Limits = LIMITS,
    on_ready: Callable[[int], None] = lambda port: None,
) -> None:
    """Serve until a signal.

    Parameters
    ----------
    listening: a bound socket, as from `listen.bind`; one on loopback answers requests for this machine's name only
    batcher: one of BATCHERS
    api_key: key that requests must bring; None asks for none
    on_ready: gets the port once requests are taken
    """
    worker = Worker(make_batcher(batcher, served, limits), limits.rows, limits.waiting)
    service = Service.of(served, worker)
    hosts = (*LOOPBACK, "[::1]") if listening.getsockname()[0] in LOOPBACK else ()
    config = uvicorn.Config(
        make_app(service, limits, api_key, hosts),
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=round(limits.grace_s) + 5,
    )
    with _signals_kept():
        Server(config, service, limits.grace_s, on_ready).run(sockets=[listening])


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """uvicorn raises its signals again at the end: let them do nothing then, so that the process ends with 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {sig: signal.signal(sig, lambda *_: None) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)

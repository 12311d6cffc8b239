"""What happens to a request before it is read: its key, the size of its body, and the time that the body may take.

A plain ASGI middleware, because a limit on a body must hold while it arrives.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from mixoff.serving import page, replies
from mixoff.units import format_nbytes

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OPEN = ("/health", *page.FILES)  # need no key


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Guard:
    """Refuses requests without the key, and bodies that are too large or too slow.

    api_key: None asks for none
    most_nbytes: largest body
    body_s: seconds until a body must have arrived
    """

    app: Any
    api_key: str | None = None
    most_nbytes: int = 4 << 20
    body_s: float = 30.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or answer it with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await asyncio.wait_for(self._body(scope, receive), self.body_s)
        except asyncio.TimeoutError:
            await self._refuse(408, f"the body did not arrive within {self.body_s:g} s", scope, receive, send)
            return
        except _Refused as refusal:
            await self._refuse(refusal.status, str(refusal), scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    async def _refuse(self, status: int, message: str, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"Connection": "close"} | ({"WWW-Authenticate": "Bearer"} if status == 401 else {})
        await JSONResponse(replies.error(message, status), status, headers=headers)(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if self.api_key is None or scope["path"] in OPEN:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not secrets.compare_digest(given, b"Bearer " + self.api_key.encode()):
            raise _Refused(401, "this server asks for its API key: send it as `Authorization: Bearer KEY`")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away first."""
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length[:20]) > self.most_nbytes:
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.most_nbytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> _Refused:
        return _Refused(413, f"the body is larger than {format_nbytes(self.most_nbytes)}: shorten the request")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again

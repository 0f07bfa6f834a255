"""ASGI middleware: answers that are sent before the body of the request was read.

On HTTP/1 such an answer says `Connection: close`: the client need not send the rest, and what it
sends is not parsed as another request.  HTTP/2 forbids that header and does not need it.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class UnreadBody:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _has_body(Headers(scope=scope)):
            body = _Body(scope, receive, send)
            await self._app(scope, body.receive, body.send)
        else:
            await self._app(scope, receive, send)


class _Body:
    """The body of one request: whether it has been read when the answer begins."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._http_1 = scope["http_version"].startswith("1")
        self._receive, self._send = receive, send
        self._read = False
        self._discarding: asyncio.Task[None] | None = None

    async def receive(self) -> Message:
        if self._discarding is not None:
            await asyncio.shield(self._discarding)
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._read |= not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._read:
            if self._http_1:
                MutableHeaders(scope=message)["connection"] = "close"
            # The server passes on what arrives through a short queue: if it were full, not even the
            # end of the request would get through.
            self._discarding = asyncio.create_task(self._discard())
        await self._send(message)

    async def _discard(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

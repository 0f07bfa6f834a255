"""Server-sent events over ASGI, with comments while there is nothing to say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KEEP_ALIVE = b": waiting\n\n"
KEEP_ALIVE_SECONDS = 5.0


class EventStream(Response):
    """Sends what `chunks` yields; a comment after some silent seconds.

    Starlette's StreamingResponse is not used: it cancels the producer when the client leaves.
    Here `watcher` has told the request itself, and the rest of the events go nowhere.
    """

    def __init__(self, chunks: AsyncIterator[bytes], watcher: asyncio.Task[None]) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._chunks = chunks
        self._watcher = watcher
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )
        # A task of its own: with a timeout at each chunk, chunks would cost twice as much.
        keeper = asyncio.create_task(self._keep_alive(send))
        try:
            async for data in self._chunks:
                self._sent += 1
                await send({"type": "http.response.body", "body": data, "more_body": True})
            keeper.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            keeper.cancel()
            self._watcher.cancel()

    async def _keep_alive(self, send: Send) -> None:
        while True:
            before = self._sent
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            if self._sent == before:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})

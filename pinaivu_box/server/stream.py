"""Server-sent events over ASGI, with comments while there is nothing to say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KEEP_ALIVE = b": waiting\n\n"
KEEP_ALIVE_SECONDS = 5.0


class EventStream(Response):
    """Sends what `chunks` yields; a comment after every few silent seconds.

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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )
        try:
            pending: asyncio.Future[bytes] = asyncio.ensure_future(anext(self._chunks))
            while True:
                done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE_SECONDS)
                if done:
                    try:
                        data = pending.result()
                    except StopAsyncIteration:
                        break
                    pending = asyncio.ensure_future(anext(self._chunks))
                else:
                    data = KEEP_ALIVE
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._watcher.cancel()

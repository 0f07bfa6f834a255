"""Server-sent events: how one is written, and the answer that streams them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pinaivu_box.server.chunks import ChunkWriter, chunk_writer

END_OF_EVENT = b"\n\n"
DONE = b"data: [DONE]" + END_OF_EVENT
KEEP_ALIVE = b": waiting" + END_OF_EVENT
KEEP_ALIVE_SECONDS = 5.0

PLACEHOLDER = "\x00"  # encoded as \u0000, which nothing else in a chunk can contain
_ENCODED_PLACEHOLDER = b'"\\u0000"'

encode_json = msgspec.json.Encoder().encode


def encode_event(data: object, name: str = "", event_id: str = "") -> bytes:
    """One event with `data` as JSON, with a `name` and an id if it has them."""
    head = b"event: %b\ndata: " % name.encode() if name else b"data: "
    if event_id:
        head = b"id: %b\n%b" % (event_id.encode(), head)
    return head + encode_json(data) + END_OF_EVENT


def around_text(event: bytes) -> tuple[bytes, bytes]:
    """What stands before and after the text of an encoded event whose one text is `PLACEHOLDER`, so
    that of each event like it the text alone is encoded."""
    before, after = event.split(_ENCODED_PLACEHOLDER)
    return before, after


def encode_line(data: object) -> bytes:
    """A line of JSON, for a `LineStream`."""
    return encode_json(data) + b"\n"


class EventStream(Response):
    """Sends the encoded events that `chunks` yields, and a comment after some silent seconds.

    Starlette's StreamingResponse is not used, because it cancels the producer when the client
    leaves.  Here `watcher` notices that and tells the request; what is still sent goes nowhere.
    The producer may also write by itself; see `chunks`.
    """

    media_type = "text/event-stream"
    keep_alive = KEEP_ALIVE

    def __init__(self, chunks: AsyncIterator[bytes], watcher: asyncio.Task[None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._watcher = watcher
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )
        # A task of its own: a timeout around each chunk would double what a chunk costs.
        writer = chunk_writer(scope)
        keeper = asyncio.create_task(self._keep_alive(send, writer))
        try:
            async for data in self._chunks:
                if writer is not None and writer.ready:
                    writer.write(data)
                    continue
                self._sent += 1
                await send({"type": "http.response.body", "body": data, "more_body": True})
            keeper.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            keeper.cancel()
            self._watcher.cancel()

    async def _keep_alive(self, send: Send, writer: ChunkWriter | None) -> None:
        while True:
            before = self._sent, writer and writer.written
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            if before == (self._sent, writer and writer.written) and self.keep_alive:
                data = self.keep_alive
                await send({"type": "http.response.body", "body": data, "more_body": True})


class LineStream(EventStream):
    """The same as lines of JSON, in which there are no comments."""

    media_type = "application/x-ndjson"
    keep_alive = b""

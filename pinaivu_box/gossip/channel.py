"""The gossip over one link: a queue of frames to send, within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pinaivu_box.errors import LinkLost
from pinaivu_box.transport.link import Stream

MAX_QUEUED_BYTES = 8_000_000  # about a whole roster, and the adverts of a thousand boxes
SEND_SECONDS = 30.0  # for one frame
NOT_READING = "it does not read what it is sent"


class GossipChannel:
    """Sends and receives the frames of one link's gossip stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._queued_bytes = 0

    def send(self, frame: bytes) -> bool:
        """Queue a frame; returns False if so much is queued that the peer cannot be reading."""
        self._queue.put_nowait(frame)
        self._queued_bytes += len(frame)
        return self._queued_bytes <= MAX_QUEUED_BYTES

    async def flush(self) -> None:
        """Wait until every queued frame is on its way."""
        await self._queue.join()

    async def run(self, on_frame: Callable[[bytes], None]) -> str:
        """Send and receive until one side ends it; returns why, for the peer's operator.  Raises
        what `on_frame` raises."""
        tasks = [
            asyncio.create_task(self._send_queued()),
            asyncio.create_task(self._receive_all(on_frame)),
        ]
        try:
            (first, *_), _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        error = first.exception()
        if isinstance(error, TimeoutError):
            return NOT_READING
        if isinstance(error, LinkLost):
            return error.reason or "the gossip has ended"
        if error is not None:
            raise error
        return "no more gossip"

    async def _send_queued(self) -> None:
        while True:
            frame = await self._queue.get()
            async with asyncio.timeout(SEND_SECONDS):
                await self._stream.send(frame)
            self._queued_bytes -= len(frame)
            self._queue.task_done()

    async def _receive_all(self, on_frame: Callable[[bytes], None]) -> None:
        while (frame := await self._stream.receive()) is not None:
            on_frame(frame)
            await asyncio.sleep(0)  # signatures were checked: let other tasks run

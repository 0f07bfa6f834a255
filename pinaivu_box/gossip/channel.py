"""The gossip over one link: what is to be said waits here, within bounds."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from pinaivu_box.errors import LinkLost
from pinaivu_box.transport.transport import Stream
from pinaivu_box.transport.wire import Code

MAX_WAITING_BYTES = 8_000_000  # about a whole roster, and the adverts of a thousand boxes
SEND_SECONDS = 30.0  # for one frame
DEAF = "it does not read what it is sent"


class GossipChannel:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._more = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    def say(self, frame: bytes) -> bool:
        """Send it when it is its turn; False if so much waits that the peer must be deaf."""
        self._waiting.append(frame)
        self._bytes += len(frame)
        self._more.set()
        self._empty.clear()
        return self._bytes <= MAX_WAITING_BYTES

    async def said(self) -> None:
        """Wait until all is on its way."""
        await self._empty.wait()

    async def run(self, heard: Callable[[bytes], None]) -> LinkLost:
        """Until one side ends it; says why."""
        tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._hear(heard))]
        try:
            (first, *_), _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        error = first.exception()
        if isinstance(error, TimeoutError):
            return LinkLost("The peer is deaf.", code=Code.PROTOCOL, reason=DEAF)
        if isinstance(error, LinkLost):
            return error
        if error is not None:
            raise error
        return LinkLost("The peer ended the gossip.", code=Code.PROTOCOL, reason="no more gossip")

    async def _send(self) -> None:
        while True:
            while not self._waiting:
                self._empty.set()
                self._more.clear()
                await self._more.wait()
            async with asyncio.timeout(SEND_SECONDS):
                await self._stream.send(self._waiting[0])
            self._bytes -= len(self._waiting.popleft())

    async def _hear(self, heard: Callable[[bytes], None]) -> None:
        while (frame := await self._stream.receive()) is not None:
            heard(frame)
            await asyncio.sleep(0)  # others want to live while signatures are checked

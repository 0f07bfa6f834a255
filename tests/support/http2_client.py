"""A client of HTTP/2 that does what libraries do not: it resets, floods, and reads when it is told
to."""

from __future__ import annotations

import asyncio
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import h2.connection
import h2.events
from h2.config import H2Configuration

from tests.support.waiting import soon


class Http2Client:
    """`answers` are the bodies so far, `statuses` and `ended` by stream; with `reads` False it
    takes what comes and opens no window, so that the server may send 64 kB of each stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        settings = H2Configuration(validate_outbound_headers=False)
        self.talk = h2.connection.H2Connection(settings)
        self.reads = True
        self.answers: defaultdict[int, bytearray] = defaultdict(bytearray)
        self.statuses: dict[int, int] = {}
        self.ended: set[int] = set()
        self.resets: dict[int, int] = {}  # error codes
        self.gone: int | None = None  # the error code of GOAWAY
        self.closed = False
        self._reader, self._writer = reader, writer
        self._changed = asyncio.Event()
        self.talk.initiate_connection()

    async def send(self) -> None:
        """What `talk` has for the server."""
        self._writer.write(self.talk.data_to_send())
        await self._writer.drain()

    async def send_raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def request(
        self, method: str = "GET", path: str = "/", *more: tuple[str, str], end: bool = True
    ) -> int:
        """The number of its stream."""
        stream = self.talk.get_next_available_stream_id()
        self.talk.send_headers(stream, headers(method, path, *more), end_stream=end)
        await self.send()
        return stream

    async def upload(self, stream: int, size: int) -> None:
        """Send so many bytes of a body, and its end."""
        while size:
            room = self.talk.local_flow_control_window(stream)
            if part := min(size, room, 16_384):
                self.talk.send_data(stream, b"x" * part)
                size -= part
                await self.send()
            else:
                await self.until(lambda: self.talk.local_flow_control_window(stream) > 0)
        self.talk.end_stream(stream)
        await self.send()

    async def until(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not condition():
                assert not self.closed, f"the connection was closed ({self.gone})"
                self._changed.clear()
                await self._changed.wait()

        await soon(wait())

    async def answer(self, stream: int) -> bytes:
        await self.until(lambda: stream in self.ended)
        return bytes(self.answers[stream])

    async def read(self) -> None:
        """Until the connection ends."""
        try:
            while data := await self._reader.read(65536):
                for event in self.talk.receive_data(data):
                    self._take(event)
                await self.send()
                self._changed.set()
        except OSError:
            pass
        self.closed = True
        self._changed.set()

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.ResponseReceived():
                named = {_text(name): _text(value) for name, value in event.headers or ()}
                self.statuses[event.stream_id] = int(named[":status"])
            case h2.events.DataReceived():
                self.answers[event.stream_id] += event.data or b""
                if self.reads:
                    size = event.flow_controlled_length or 0
                    self.talk.acknowledge_received_data(size, event.stream_id)
            case h2.events.StreamEnded():
                self.ended.add(event.stream_id)
            case h2.events.StreamReset():
                self.resets[event.stream_id] = int(event.error_code or 0)
            case h2.events.ConnectionTerminated():
                self.gone = int(event.error_code or 0)

    def close(self) -> None:
        self._writer.close()


def headers(method: str, path: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    named = {":method": method, ":path": path, ":scheme": "http", ":authority": "box"}
    return [*named.items(), *more]


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


@asynccontextmanager
async def http2_client(
    port: int, *, reads: bool = True, context: ssl.SSLContext | None = None
) -> AsyncIterator[Http2Client]:
    """Connected over plain HTTP, or over TLS with that context."""
    client = Http2Client(*await asyncio.open_connection("127.0.0.1", port, ssl=context))
    client.reads = reads
    await client.send()
    reading = asyncio.create_task(client.read())
    try:
        yield client
    finally:
        reading.cancel()
        client.close()

"""HTTP/2: Hypercorn's protocol, with what one stream of a connection must not do to the others.

Clients reach it by ALPN over TLS, or over plain HTTP if they know that it is there.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any, cast

import h2.events
import h11
import hypercorn.protocol
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol import h2 as hypercorn_h2
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import AppWrapper

# Requests of one connection that run, those included whose streams the client has reset: they take
# a moment to end.  A client may open 100 streams.
MAX_RUNNING = 200
# Bytes that are parsed at a time, between which other connections have their turn: 64 kB of small
# frames take a tenth of a second.
_SLICE_BYTES = 8192
# How much a client may send before it is read: of one body, and of all together.
_STREAM_WINDOW_BYTES = 262_144
_CONNECTION_WINDOW_BYTES = 1_048_576
_HIGH_WATER_BYTES = 32_768  # of an answer that are held for a slow reader
_LOW_WATER_BYTES = 16_384


class RequestBody:
    """The body of one stream, as the application reads it.

    At most a window of flow control is held, which opens again as it is read.  In Hypercorn's queue
    ten frames that nobody reads would stop the whole connection.
    """

    def __init__(self, protocol: Http2, stream_id: int) -> None:
        self._protocol, self._stream_id = protocol, stream_id
        self._data = bytearray()
        self._events: list[dict[str, Any]] = []  # the end of the body, and of the stream
        self._something = asyncio.Event()

    def add(self, data: bytes) -> None:
        self._data += data
        self._something.set()

    async def put(self, message: dict[str, Any]) -> None:
        """What Hypercorn says: the end of the body, and that the stream is closed."""
        self._events.append(message)
        self._something.set()

    async def get(self) -> dict[str, Any]:
        """The next message for the application."""
        await self._something.wait()
        if self._data:
            data = bytes(self._data)
            self._data.clear()
            await self._protocol.open_window(self._stream_id, len(data))
            message = {"type": "http.request", "body": data, "more_body": True}
        else:
            message = self._events.pop(0)
        if not self._data and not self._events:
            self._something.clear()
        return message


class AnswerBuffer(hypercorn_h2.StreamBuffer):
    """What is to be sent on one stream.  Who writes waits while it is full; Hypercorn's wakes them
    when nothing could be sent as well, so that all of an answer is held for a client that does not
    read."""

    def __init__(self, event_class: Any) -> None:
        super().__init__(event_class)
        self._room = asyncio.Event()

    async def push(self, data: bytes) -> None:
        if self._complete:
            raise hypercorn_h2.BufferCompleteError
        self.buffer.extend(data)
        await self._is_empty.clear()
        if len(self.buffer) >= _HIGH_WATER_BYTES:
            self._room.clear()
            await self._room.wait()

    async def pop(self, max_length: int) -> bytes:
        data = await super().pop(max_length)
        if len(self.buffer) < _LOW_WATER_BYTES:
            self._room.set()
        return data

    async def close(self) -> None:
        await super().close()
        self._room.set()


class Http2(hypercorn_h2.H2Protocol):
    """One connection.  Other than Hypercorn's:

    - a body that is not read, and an answer that is not read, hold their own stream only;
    - a client that opens and resets streams without end has `MAX_RUNNING` requests, no more;
    - data for a stream whose answer has ended does not end the connection;
    - whoever writes an answer goes on, and finds out, when the connection has closed;
    - several cookie headers are one, as RFC 9113 (8.2.3) says;
    - priorities are ignored, as RFC 9113 (5.3) allows, and CONNECT is refused.
    """

    def __init__(self, app: AppWrapper, *more: Any, **named: Any) -> None:
        super().__init__(app, *more, **named)
        self.connection.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: self.config.h2_max_concurrent_streams,
                SettingCodes.MAX_HEADER_LIST_SIZE: self.config.h2_max_header_list_size,
                SettingCodes.INITIAL_WINDOW_SIZE: _STREAM_WINDOW_BYTES,
            },
        )
        self._application = app
        self._running = 0
        self._bodies: dict[int, RequestBody] = {}

    async def initiate(self, *more: Any, **named: Any) -> None:
        await super().initiate(*more, **named)
        self.connection.increment_flow_control_window(_CONNECTION_WINDOW_BYTES)
        await self._flush()

    async def handle(self, event: Event) -> None:
        if isinstance(event, RawData):
            for start in range(0, len(event.data), _SLICE_BYTES):
                if start:
                    await asyncio.sleep(0)
                try:
                    await super().handle(RawData(event.data[start : start + _SLICE_BYTES]))
                except ProtocolError:  # it came with what has ended the connection
                    await self.send(Closed())
                    return
        elif isinstance(event, Closed):
            await super().handle(event)
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()
        else:
            await super().handle(event)

    async def open_window(self, stream_id: int, size: int) -> None:
        """The application has read so many bytes of a stream's body."""
        stream = self.connection.streams.get(stream_id)
        if not self.closed and stream is not None and stream.open:
            with suppress(ProtocolError):
                self.connection.increment_flow_control_window(size, stream_id)
            await self._flush()

    async def stream_send(self, event: StreamEvent) -> None:
        if not (self.closed and isinstance(event, StreamClosed)):  # it would begin to idle
            await super().stream_send(event)
        if isinstance(event, StreamClosed):
            # What still comes of its body is passed over.  Resetting the stream would stop it, but
            # there are clients that then never read the answer.
            self._bodies.pop(event.stream_id, None)

    def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        with suppress(ProtocolError):  # the client has reset it itself
            self.connection.reset_stream(stream_id, code)

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            match event:
                case h2.events.DataReceived():
                    await self._take_data(event)
                case h2.events.PriorityUpdated():
                    pass
                case h2.events.RequestReceived():
                    await super()._handle_events([event])
                    await self._note_idle()  # it may have been refused
                case h2.events.StreamReset():
                    self._bodies.pop(event.stream_id, None)
                    if (buffer := self.stream_buffers.get(event.stream_id)) is not None:
                        await buffer.close()  # who waits for room in it has to find out
                    await super()._handle_events([event])
                    await self._note_idle()
                case _:
                    await super()._handle_events([event])
        await self._flush()

    async def _note_idle(self) -> None:
        """Without streams, the connection is closed after a while."""
        if not self.streams:
            await self.send(Updated(idle=True))

    async def _take_data(self, event: h2.events.DataReceived) -> None:
        size, data = event.flow_controlled_length or 0, event.data or b""
        stream_id = event.stream_id
        body = self._bodies.get(stream_id)
        if not size:
            return
        if body is None:
            self.connection.acknowledge_received_data(size, stream_id)
            return
        # The window of the connection is for all streams, and opens at once.
        self.connection.increment_flow_control_window(size)
        if data:
            body.add(data)
        if size > len(data):  # padding
            await self.open_window(stream_id, size - len(data))

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        stream_id = request.stream_id
        headers = cast("list[tuple[bytes, bytes]]", request.headers or [])
        if self._running >= MAX_RUNNING:
            self._reset(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        if not _is_request(dict(headers)):
            with suppress(ProtocolError):
                self.connection.send_headers(stream_id, [(b":status", b"400")], end_stream=True)
            return
        request.headers = cast("Any", _one_cookie(headers))
        body = self._bodies[stream_id] = RequestBody(self, stream_id)
        self._running += 1
        self.app = cast("AppWrapper", partial(self._run, body))
        await super()._create_stream(request)
        if (stream := self.streams.get(stream_id)) is not None:
            stream.app_put = body.put

    async def _run(self, body: RequestBody, scope: Any, _receive: Any, *more: Any) -> None:
        try:
            await self._application(scope, body.get, *more)  # type: ignore[arg-type]
        finally:
            self._running -= 1

    async def _send_data(self, stream_id: int) -> None:
        if stream_id in self.stream_buffers:
            await super()._send_data(stream_id)
        else:  # it was reset
            self.priority.remove_stream(stream_id)


def _is_request(headers: dict[bytes, bytes]) -> bool:
    path = headers.get(b":path", b"")
    return headers[b":method"].upper() != b"CONNECT" and path.startswith(b"/") and path.isascii()


def _one_cookie(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    cookies = [value for name, value in headers if name == b"cookie"]
    if len(cookies) < 2:
        return headers
    others = [header for header in headers if header[0] != b"cookie"]
    return [*others, (b"cookie", b"; ".join(cookies))]


class Http1(H11Protocol):
    """Hypercorn's, without the upgrade to HTTP/2 over plain HTTP, which RFC 9113 has dropped: by
    it a client gets past the rules of a proxy that passes the header on."""

    async def _check_protocol(self, event: h11.Request) -> None:
        if all(name.lower() != b"upgrade" for name, _ in event.headers):
            await super()._check_protocol(event)


def install() -> None:
    """Have Hypercorn use them."""
    hypercorn.protocol.H11Protocol = Http1  # type: ignore[attr-defined]
    hypercorn_h2.StreamBuffer = AnswerBuffer  # type: ignore[misc]
    hypercorn.protocol.H2Protocol = Http2  # type: ignore[attr-defined]

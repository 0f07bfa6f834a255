"""How a stream between members begins: its first frame says what it is for.

Who opens a stream sends an `Open`; the frames after it belong to that purpose.  The other side
goes on with the conversation, or answers a `Refusal` and finishes: the link stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Annotated

import msgspec
from msgspec import Meta, Struct, msgpack

from pinaivu_box import __version__
from pinaivu_box.errors import LinkLost, PeeringError, PeerRefused, ProtocolError
from pinaivu_box.transport import wire
from pinaivu_box.transport.connections import OpenLink
from pinaivu_box.transport.transport import Stream
from pinaivu_box.transport.wire import Code

VERSION = 1
MAX_INBOUND_STREAMS = 1024  # of all peers
FIRST_FRAME_SECONDS = 10.0
_MAX_OPEN_BYTES = 256  # a purpose is short
_DRAIN_SECONDS = 5.0

# Gets a stream after its `Open`, from a member, and ends it.  May raise PeeringErrors.
StreamHandler = Callable[[str, Stream], Awaitable[None]]
# The same, for the network's own purposes, whoever opened the stream.
LinkHandler = Callable[[OpenLink, Stream], Awaitable[None]]
log = logging.getLogger("pinaivu.peering")


class Open(Struct, frozen=True, tag="Open"):
    """`v` is the version of that purpose's frames."""

    purpose: Annotated[str, Meta(min_length=1, max_length=32)]
    v: Annotated[int, Meta(ge=1)] = VERSION


class Refusal(Struct, frozen=True, tag="Refusal"):
    """`code` is a `wire.Code`, `message` a sentence for an operator."""

    code: int
    message: Annotated[str, Meta(max_length=wire.MAX_REASON_BYTES)]


_open_frames = msgpack.Decoder(Open)
_refusals = msgpack.Decoder(Refusal)


def decode_open(frame: bytes | None) -> Open:
    """Read a stream's first frame; None is the end of the stream.  Raises ProtocolError."""
    return wire.decode((frame or b"")[: _MAX_OPEN_BYTES + 1], _open_frames)


async def refuse(stream: Stream, code: int, message: str) -> None:
    """Answer a Refusal, and wait until the peer has read it.  Raises LinkLost."""
    await stream.send(wire.encode(Refusal(code, wire.cut(message).decode())))
    await stream.finish()
    await drain(stream)


async def drain(stream: Stream) -> None:
    """Wait until the peer finishes, and discard what it sends: who abandons a stream at once loses
    what is on its way."""
    with suppress(LinkLost, TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while await stream.receive() is not None:
                pass
    stream.abandon()


class OpenedStream:
    """A stream that this side has opened for a purpose: `opening` is sent together with the first
    frames, and if the first response is a `Refusal`, `receive` raises PeerRefused.  All else is as
    in `transport.Stream`."""

    def __init__(self, peer: str, stream: Stream, opening: Open) -> None:
        self._peer, self._stream = peer, stream
        self._unsent = [wire.encode(opening)]
        self._answered = False
        self.abandon = stream.abandon

    async def send(self, *frames: bytes) -> None:
        opening, self._unsent = self._unsent, []
        await self._stream.send(*opening, *frames)

    async def finish(self) -> None:
        await self._send_open()
        await self._stream.finish()

    async def _send_open(self) -> None:
        if self._unsent:
            await self.send()

    async def receive(self) -> bytes | None:
        await self._send_open()
        frame = await self._stream.receive()
        if not self._answered and frame is not None:
            self._answered = True
            self._raise_if_refused(frame)
        return frame

    def _raise_if_refused(self, frame: bytes) -> None:
        try:
            refusal = _refusals.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        self._stream.abandon()
        reason = wire.printable(refusal.message)
        raise PeerRefused(f"{wire.short(self._peer)} refused: {reason}", code=refusal.code)


class StreamRouter:
    """Gives each stream that a peer opens to the handler of its purpose, or refuses it; `count` of
    them are open."""

    def __init__(
        self,
        link_handlers: Mapping[str, LinkHandler],
        handlers: Mapping[str, StreamHandler],
        rejection_reason: Callable[[str], Awaitable[str | None]],
        rejection_code: Callable[[str], Code],
    ) -> None:
        """`rejection_reason` returns why a peer may use `link_handlers` alone, or None;
        `rejection_code` the code with which the link to it is closed then."""
        self.count = 0
        self._link_handlers, self._handlers = link_handlers, handlers
        self._rejection_reason, self._rejection_code = rejection_reason, rejection_code

    async def handle(self, link: OpenLink, stream: Stream) -> None:
        """Serve a stream until its end.  A failure ends it; a violation of the protocol ends the
        link."""
        self.count += 1
        try:
            if self.count > MAX_INBOUND_STREAMS:
                await refuse(stream, Code.BUSY, "this box has too many streams: try again")
                return
            async with asyncio.timeout(FIRST_FRAME_SECONDS):
                frame = await stream.receive()
            await self._route(link, decode_open(frame), stream)
        except ProtocolError as error:
            await link.link.close(Code.PROTOCOL, error.message)
        except (PeeringError, TimeoutError) as error:
            log.debug("a stream of %s failed: %s", wire.short(link.peer), error)
            stream.abandon()
        except Exception:
            log.exception("a stream of %s failed", wire.short(link.peer))
            stream.abandon()
        finally:
            self.count -= 1

    async def _route(self, link: OpenLink, opening: Open, stream: Stream) -> None:
        link_handler = self._link_handlers.get(opening.purpose)
        handler = self._handlers.get(opening.purpose)
        if opening.v != VERSION or (link_handler is None and handler is None):
            await refuse(
                stream,
                Code.VERSION,
                f"this box (software {__version__}) does not support '{opening.purpose}' version "
                f"{opening.v}: update the older of the two boxes",
            )
        elif link_handler is not None:
            await link_handler(link, stream)
        elif (why := await self._rejection_reason(link.peer)) is not None:
            await link.link.close(self._rejection_code(link.peer), why)
        elif handler is not None:
            link.inbound_streams += 1
            try:
                await handler(link.peer, stream)
            finally:
                link.inbound_streams -= 1

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
_HEAD = 256  # bytes; a purpose is short
_DRAIN_SECONDS = 5.0


class Open(Struct, frozen=True, tag="Open"):
    """`v` is the version of that purpose's frames."""

    purpose: Annotated[str, Meta(min_length=1, max_length=32)]
    v: Annotated[int, Meta(ge=1)] = VERSION


class Refusal(Struct, frozen=True, tag="Refusal"):
    """`code` is a `wire.Code`, `message` a sentence for an operator."""

    code: int
    message: Annotated[str, Meta(max_length=wire.MAX_REASON_BYTES)]


_open = msgpack.Decoder(Open)
_refusal = msgpack.Decoder(Refusal)


def decode_open(frame: bytes | None) -> Open:
    """Raises ProtocolError."""
    return wire.decode((frame or b"")[: _HEAD + 1], _open)


async def refuse(stream: Stream, code: int, message: str) -> None:
    """Politely: wait until the other side has read it.  LinkLost."""
    await stream.send(wire.encode(Refusal(code, wire.cut(message).decode())))
    await stream.finish()
    await drain(stream)


async def drain(stream: Stream) -> None:
    """Let the peer finish, whatever it still says: who abandons loses what is under way."""
    with suppress(LinkLost, TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while await stream.receive() is not None:
                pass
    stream.abandon()


class OpenedStream:
    """A stream that we have opened for a purpose: `opening` goes before whatever is said first, at
    once with it, and if the first answer is a `Refusal`, `receive` raises PeerRefused.  All else is
    as `transport.Stream` says."""

    def __init__(self, peer: str, stream: Stream, opening: Open) -> None:
        self._peer, self._stream = peer, stream
        self._opening = [wire.encode(opening)]
        self._answered = False
        self.abandon = stream.abandon

    async def send(self, *frames: bytes) -> None:
        before, self._opening = self._opening, []
        await self._stream.send(*before, *frames)

    async def finish(self) -> None:
        await self._open()
        await self._stream.finish()

    async def _open(self) -> None:
        if self._opening:
            await self.send()

    async def receive(self) -> bytes | None:
        await self._open()
        frame = await self._stream.receive()
        if not self._answered and frame is not None:
            self._answered = True
            self._check(frame)
        return frame

    def _check(self, frame: bytes) -> None:
        try:
            refusal = _refusal.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        self._stream.abandon()
        said = wire.printable(refusal.message)
        raise PeerRefused(f"{wire.short(self._peer)} refused: {said}", code=refusal.code)


MAX_INCOMING = 1024  # of all peers
FIRST_FRAME_SECONDS = 10.0

# Gets a stream after its `Open`, from a member, and ends it; PeeringErrors may leave it.
Handler = Callable[[str, Stream], Awaitable[None]]
# The network's own, whoever it is from.
OwnHandler = Callable[[OpenLink, Stream], Awaitable[None]]
log = logging.getLogger("pinaivu.peering")


class Incoming:
    """`why_not` says why a peer may open nothing but `own` purposes, or None; `code` with which the
    link to it is closed then."""

    def __init__(
        self,
        own: Mapping[str, OwnHandler],
        handlers: Mapping[str, Handler],
        why_not: Callable[[str], Awaitable[str | None]],
        code: Callable[[str], Code],
    ) -> None:
        self.count = 0
        self._own, self._handlers, self._why_not, self._code = own, handlers, why_not, code

    async def take(self, held: OpenLink, stream: Stream) -> None:
        """All of a stream's life.  A failure ends it; what breaks the protocol ends the link."""
        self.count += 1
        try:
            if self.count > MAX_INCOMING:
                await refuse(stream, Code.BUSY, "this box has too many streams: try again")
                return
            async with asyncio.timeout(FIRST_FRAME_SECONDS):
                frame = await stream.receive()
            await self._hand_over(held, decode_open(frame), stream)
        except ProtocolError as error:
            await held.link.close(Code.PROTOCOL, error.message)
        except (PeeringError, TimeoutError) as error:
            log.debug("a stream of %s failed: %s", wire.short(held.peer), error)
            stream.abandon()
        except Exception:
            log.exception("a stream of %s failed", wire.short(held.peer))
            stream.abandon()
        finally:
            self.count -= 1

    async def _hand_over(self, held: OpenLink, opened: Open, stream: Stream) -> None:
        own, handler = self._own.get(opened.purpose), self._handlers.get(opened.purpose)
        if opened.v != VERSION or (own is None and handler is None):
            await refuse(
                stream,
                Code.VERSION,
                f"this box (software {__version__}) has no '{opened.purpose}' of version "
                f"{opened.v}: update the older of the two boxes",
            )
        elif own is not None:
            await own(held, stream)
        elif (why := await self._why_not(held.peer)) is not None:
            await held.link.close(self._code(held.peer), why)
        elif handler is not None:
            held.streams += 1
            try:
                await handler(held.peer, stream)
            finally:
                held.streams -= 1

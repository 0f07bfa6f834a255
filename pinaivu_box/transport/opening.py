"""How a stream between members begins: its first frame says what it is for.

Who opens a stream sends an `Open`; the frames after it belong to that purpose.  The other side
goes on with the conversation, or answers a `Refusal` and finishes: the link stays.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated

import msgspec
from msgspec import Meta, Struct, msgpack

from pinaivu_box.errors import LinkLost, PeerRefused
from pinaivu_box.transport import wire
from pinaivu_box.transport.transport import Stream

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

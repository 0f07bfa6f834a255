"""Requests and responses over a stream: messages of known types, with time limits and a budget.

A protocol that runs over streams (joining, model files, the ledger) names its messages and their
limits here and writes neither loops over frames nor time limits of its own.  All errors are
`errors.PeeringError`s, but for the TimeoutError of a receive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from msgspec import Struct, msgpack

from pinaivu_box.errors import LinkLost, PeeringError, PeerRefused, ProtocolError
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Stream

SEND_SECONDS = 30.0  # for the peer to take what is sent at once

Sent = TypeVar("Sent", bound=Struct)
Received = TypeVar("Received")
Kind = TypeVar("Kind")
T = TypeVar("T")


class RequestRejected(PeerRefused):
    """The peer answered with a rejection; `reason` is its sentence, printable."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"{wire.short(peer)} refused: {reason}", code=wire.Code.FORBIDDEN)
        self.reason = reason


class UnexpectedMessage(ProtocolError):
    """A message of a type that does not belong there, or the end of the stream in its place."""


async def send_frames(stream: Stream, *frames: bytes) -> None:
    """Send frames at once.  Raises LinkLost, also if the peer does not take them in time: then the
    stream is abandoned."""
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await stream.send(*frames)
    except TimeoutError:
        raise LinkLost("The peer does not take what it is sent.") from None


class MessageStream(Generic[Sent, Received]):
    """One conversation with a peer.  As a context manager it finishes the stream at the end of the
    block and reads it to its end, for which nobody waits, and abandons it if the block raises."""

    def __init__(
        self,
        peer: str,
        stream: Stream,
        decoder: msgpack.Decoder[Received],
        *,
        receive_seconds: float,
        max_messages: int | None = None,
        rejection: type[Any] | None = None,
        keepalive: type[Any] | None = None,
    ) -> None:
        """`receive_seconds` are for each message, `max_messages` for all that the peer may send.
        `rejection` is the type of the message that rejects any request, with a sentence as its
        `message`; `keepalive` the type of the one that says no more than that a response takes
        time."""
        self.peer, self.stream = peer, stream
        self._decoder = decoder
        self._receive_seconds = receive_seconds
        self._max_messages, self._received = max_messages, 0
        self._rejection, self._keepalive = rejection, keepalive

    async def __aenter__(self) -> MessageStream[Sent, Received]:
        return self

    async def __aexit__(self, kind: object, error: object, traceback: object) -> None:
        if error is not None:
            self.stream.abandon()
            return
        try:
            await self.stream.finish()
        except BaseException:
            self.stream.abandon()
            raise
        self.stream.leave()

    async def send(self, *messages: Sent) -> None:
        """Send messages at once.  Raises LinkLost, also if the peer does not take them in time."""
        await send_frames(self.stream, *map(wire.encode, messages))

    async def receive(self, seconds: float | None = None) -> Received | None:
        """Wait for the next message, for `seconds` instead of `receive_seconds` if they are given.

        Returns None once the peer has finished.  Raises TimeoutError, LinkLost, RequestRejected,
        and ProtocolError if it is none of the messages, or one more than `max_messages`.
        """
        self._received += 1
        if self._max_messages is not None and self._received > self._max_messages:
            raise ProtocolError(f"{wire.short(self.peer)} sent over {self._max_messages} messages.")
        async with asyncio.timeout(self._receive_seconds if seconds is None else seconds):
            frame = await self.stream.receive()
        if frame is None:
            return None
        message = wire.decode(frame, self._decoder)
        if self._rejection is not None and isinstance(message, self._rejection):
            raise RequestRejected(self.peer, wire.printable(message.message))
        return message

    async def expect(self, kind: type[Kind], seconds: float | None = None) -> Kind:
        """Wait for a message of that type; keepalives are passed over.  Raises as `receive`, and
        UnexpectedMessage."""
        while True:
            message = await self.receive(seconds)
            if isinstance(message, kind):
                return message
            if self._keepalive is None or not isinstance(message, self._keepalive):
                came = "nothing" if message is None else f"'{type(message).__name__}'"
                raise UnexpectedMessage(
                    f"{wire.short(self.peer)} sent {came} instead of '{kind.__name__}'."
                )

    async def call(self, request: Sent, kind: type[Kind]) -> Kind:
        """Send a request and return its response.  Raises as `send` and `expect`."""
        await self.send(request)
        return await self.expect(kind)

    async def wait_for(self, work: Awaitable[T], keepalive: Sent, seconds: float) -> T:
        """Return the result of some work, and send the keepalive each `seconds` until then.  The
        work is cancelled if the peer is lost.  Raises LinkLost, and what the work raises."""
        running = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({running}, timeout=seconds))[0]:
                await self.send(keepalive)
            return running.result()
        finally:
            running.cancel()

    async def end_with(self, message: Sent) -> None:
        """Send a last message and wait until the peer has read it: what is sent before a stream is
        abandoned may be lost.  A peer that is gone meanwhile is no error."""
        with suppress(PeeringError):
            await self.send(message)
            await self.stream.drain()

"""Serving the streams that peers open: each goes to the handler of its purpose, or is refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from pinaivu_box import __version__
from pinaivu_box.errors import PeeringError, ProtocolError
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.wire import Code, Open, Refusal

MAX_INBOUND_STREAMS = 1024  # of all peers
FIRST_FRAME_SECONDS = 10.0

# Gets the node id of a peer and a stream of it, after the `Open`, and ends the stream.  May raise
# PeeringErrors.
StreamHandler = Callable[[str, Stream], Awaitable[None]]
log = logging.getLogger("pinaivu.peering")


async def refuse(stream: Stream, code: int, message: str) -> None:
    """Answer a Refusal, and wait until the peer has read it.  Raises LinkLost."""
    await stream.send(wire.encode(Refusal(code, wire.cut(message).decode())))
    await stream.drain()


class StreamRouter:
    """Gives each stream that a peer opens to the handler of its purpose, or refuses it; `count` of
    them are open."""

    def __init__(
        self,
        for_all: Mapping[str, StreamHandler],
        handlers: Mapping[str, StreamHandler],
        rejected: Callable[[str], Awaitable[tuple[Code, str] | None]],
    ) -> None:
        """Handlers by purpose: those `for_all`, and those for peers of which `rejected` returns
        None; else it returns with which code and reason the link to the peer is closed."""
        self.count = 0
        self._for_all, self._handlers, self._rejected = for_all, handlers, rejected

    async def handle(self, stream: Stream) -> None:
        """Serve a stream until its end.  A failure ends it; a violation of the protocol ends the
        link."""
        link = stream.link
        self.count += 1
        try:
            if self.count > MAX_INBOUND_STREAMS:
                await refuse(stream, Code.BUSY, "this box has too many streams: try again")
                return
            async with asyncio.timeout(FIRST_FRAME_SECONDS):
                frame = await stream.receive()
            await self._route(stream, wire.decode_open(frame))
            stream.leave()
        except ProtocolError as error:
            await link.close(Code.PROTOCOL, error.message)
        except (PeeringError, TimeoutError) as error:
            log.debug("a stream of %s failed: %s", wire.short(link.peer), error)
            stream.abandon()
        except Exception:
            log.exception("a stream of %s failed", wire.short(link.peer))
            stream.abandon()
        finally:
            self.count -= 1

    async def _route(self, stream: Stream, opening: Open) -> None:
        link, purpose = stream.link, opening.purpose
        handler = self._for_all.get(purpose) or self._handlers.get(purpose)
        if opening.v != wire.PURPOSE_VERSION or handler is None:
            await refuse(
                stream,
                Code.VERSION,
                f"this box (software {__version__}) does not support '{purpose}' version "
                f"{opening.v}: update the older of the two boxes",
            )
        elif purpose in self._for_all:
            await handler(link.peer, stream)
        elif (rejection := await self._rejected(link.peer)) is not None:
            await link.close(*rejection)
        else:
            link.streams.add(stream)
            try:
                await handler(link.peer, stream)
            finally:
                link.streams.discard(stream)

"""Streams that peers open: each goes to the handler of its purpose, or is refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from pinaivu_box import __version__
from pinaivu_box.errors import PeeringError, ProtocolError
from pinaivu_box.transport import opening, wire
from pinaivu_box.transport.connections import OpenLink
from pinaivu_box.transport.opening import Open
from pinaivu_box.transport.transport import Stream
from pinaivu_box.transport.wire import Code

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
                await opening.refuse(stream, Code.BUSY, "this box has too many streams: try again")
                return
            async with asyncio.timeout(FIRST_FRAME_SECONDS):
                frame = await stream.receive()
            await self._hand_over(held, opening.decode_open(frame), stream)
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
        if opened.v != opening.VERSION or (own is None and handler is None):
            await opening.refuse(
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

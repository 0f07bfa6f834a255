"""The half of a transport that does not care what carries its links: greeting and keeping them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from pinaivu_box import __version__
from pinaivu_box.errors import LinkLost, PeeringError
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Connection, HeartbeatTiming, PeerLink
from pinaivu_box.transport.wire import Code, Hello

GREETING_SECONDS = 10.0
MAX_GREETINGS = 32  # strangers at a time
_PATIENCE = 1.0  # seconds; who takes longer to greet makes room for others
MAX_WAITING = 64  # links that nobody has accepted yet
GOODBYE = "the box is shutting down"

log = logging.getLogger(__name__)


class Handshake:
    """`versions` of the protocol, the `pace` of heartbeats and the wall `clock` are for tests and
    simulations to choose."""

    def __init__(
        self,
        *,
        versions: Sequence[int] = wire.VERSIONS,
        pace: HeartbeatTiming | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._versions = tuple(versions)
        self._pace = pace or HeartbeatTiming()
        self._clock = clock
        self._greetings: dict[asyncio.Task[None], float] = {}  # since when, the oldest first
        self._waiting: deque[PeerLink] = deque()
        self._arrived = asyncio.Event()
        # A connection that nobody holds is closed by the garbage collector.
        self._links: set[PeerLink] = set()
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether nobody can be greeted now.  If so many are silent, the first of them has to go:
        else a few strangers could keep members out."""
        while len(self._greetings) >= MAX_GREETINGS:
            first, since = next(iter(self._greetings.items()))
            if time.monotonic() - since < _PATIENCE:
                return True
            del self._greetings[first]
            first.cancel()
        return self._closed

    def receive(self, handshake: Callable[[], Awaitable[Connection]]) -> None:
        """Greet who is at the door, in a task of its own; not if `full`."""
        task = asyncio.create_task(self._receive(handshake))
        self._greetings[task] = time.monotonic()
        task.add_done_callback(lambda task: self._greetings.pop(task, None))

    async def _receive(self, handshake: Callable[[], Awaitable[Connection]]) -> None:
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                link = await self._greet(await handshake(), first=False)
        except (PeeringError, TimeoutError) as error:
            log.debug("somebody was not greeted: %s", error)
            return
        if len(self._waiting) >= MAX_WAITING:
            await link.close(Code.BUSY, "this box has too many new links to look at: try again")
            return
        self._waiting.append(link)
        self._arrived.set()

    async def join(self, connection: Connection) -> PeerLink:
        """Greet whom we have called.  LinkLost, ProtocolError."""
        return await self._greet(connection, first=True)

    async def _greet(self, connection: Connection, *, first: bool) -> PeerLink:
        link = PeerLink(connection, self._pace, self._links.discard)
        self._links.add(link)
        ours = Hello(self._versions, __version__, self._clock())
        try:
            await link.greet(ours, self._clock, first=first)
        except BaseException:
            # Only the first closing counts: if there was a better reason, the peer has it.
            code, reason = Code.SILENT, f"the greeting was not over within {GREETING_SECONDS:g} s"
            if self._closed:
                code, reason = Code.SHUTDOWN, GOODBYE
            connection.close(LinkLost(reason, code=code, reason=reason))
            raise
        return link

    async def accept(self) -> PeerLink:
        while not self._waiting:
            if self._closed:
                raise LinkLost("The transport is closed.", code=Code.SHUTDOWN)
            self._arrived.clear()
            await self._arrived.wait()
        return self._waiting.popleft()

    async def close(self) -> None:
        self._closed = True
        self._arrived.set()
        for task in tuple(self._greetings):
            task.cancel()
        links = tuple(self._links)
        await asyncio.gather(*[link.close(Code.SHUTDOWN, GOODBYE) for link in links])
        self._waiting.clear()

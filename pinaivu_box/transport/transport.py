"""Transports make links to other boxes, whatever carries them: connecting, accepting, handshakes.

`iroh_transport` carries them over QUIC.  All errors are `errors.PeeringError`s.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakSet

from pinaivu_box.errors import LinkLost, PeeringError, Unreachable
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Connection, Link, LinkOptions
from pinaivu_box.transport.wire import Code

HANDSHAKE_SECONDS = 10.0
MAX_INBOUND_HANDSHAKES = 32  # at a time, of boxes that may be no members
MAX_UNACCEPTED_LINKS = 64
_EVICTION_SECONDS = 1.0  # a handshake that takes longer makes room for others
SHUTDOWN_REASON = "the box is shutting down"

log = logging.getLogger(__name__)


def is_relay(address: str) -> bool:
    """Whether it is a relay's URL, and not HOST:PORT."""
    return address.startswith(("http://", "https://"))


def no_answer(node_id: str, addresses: Sequence[str], seconds: float) -> Unreachable:
    """Return the error that a box has not answered in time."""
    relayed = any(map(is_relay, addresses))
    return Unreachable(
        f"{wire.short(node_id)} did not answer at {', '.join(addresses)} within {seconds:g} s: see "
        "that it runs with peering on, that the address is right, and that no firewall stops that "
        f"UDP port{', or that both boxes reach the relay' * relayed}."
    )


class Transport(ABC):
    """Makes links over one carrier.

    Whether a peer may have a link at all is for the caller to decide once it has the link, with
    `close(Code.FORBIDDEN, ...)` if not.
    """

    def __init__(self, node_id: str, options: LinkOptions | None) -> None:
        """`options`: for tests and simulations to choose."""
        self.node_id = node_id
        self._options = options or LinkOptions()
        self._inbound: dict[asyncio.Task[None], float] = {}  # begun when, the oldest first
        self._unaccepted: deque[Link] = deque()
        self._arrived = asyncio.Event()
        self._links: WeakSet[Link] = WeakSet()  # the heartbeats of a link keep it until its end
        self._closed = False

    @abstractmethod
    def addresses(self) -> list[str]:
        """Return how others may reach this box, nearest first: HOST:PORT, then a relay's URL."""

    @abstractmethod
    async def wait_for_addresses(self) -> None:
        """Wait until `addresses` are complete: a relay is chosen, if there are several.  Not for
        long, since perhaps none of them answers."""

    @abstractmethod
    async def dial(self, node_id: str, addresses: Sequence[str]) -> Connection:
        """Make a connection without a Hello.  Raises Unreachable, WrongPeer."""

    async def connect(self, node_id: str, addresses: Sequence[str], timeout: float) -> Link:
        """Make a link.  Raises Unreachable, WrongPeer; LinkLost if the peer refused (`code`)."""
        if node_id == self.node_id:
            raise Unreachable("That is this box itself: a box does not link to itself.")
        try:
            async with asyncio.timeout(timeout):
                return await self._upgrade(await self.dial(node_id, addresses), dialed=True)
        except TimeoutError as error:
            raise no_answer(node_id, addresses, timeout) from error

    def make_room(self) -> bool:
        """Return whether a handshake can begin now.  If there are too many, the oldest one is
        cancelled if it has had enough time: else a few silent boxes could keep members out."""
        while len(self._inbound) >= MAX_INBOUND_HANDSHAKES:
            oldest, began = next(iter(self._inbound.items()))
            if time.monotonic() - began < _EVICTION_SECONDS:
                return False
            del self._inbound[oldest]
            oldest.cancel()
        return not self._closed

    def upgrade_inbound(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        """Make a link of a connection that a peer begins, in a task; after `make_room`."""
        task = asyncio.create_task(self._upgrade_inbound(connect))
        self._inbound[task] = time.monotonic()
        task.add_done_callback(lambda task: self._inbound.pop(task, None))

    async def _upgrade_inbound(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                link = await self._upgrade(await connect(), dialed=False)
        except (PeeringError, TimeoutError) as error:
            log.debug("an inbound handshake failed: %s", error)
            return
        if len(self._unaccepted) >= MAX_UNACCEPTED_LINKS:
            await link.close(Code.BUSY, "this box has too many new links: try again")
            return
        self._unaccepted.append(link)
        self._arrived.set()

    async def _upgrade(self, connection: Connection, *, dialed: bool) -> Link:
        link = Link(connection, self._options, dialed=dialed)
        self._links.add(link)
        try:
            await link.exchange_hello()
        except BaseException:
            # Only the first closing counts: if there was a better reason, the peer has it.
            code, reason = Code.SILENT, f"the handshake took over {HANDSHAKE_SECONDS:g} s"
            if self._closed:
                code, reason = Code.SHUTDOWN, SHUTDOWN_REASON
            connection.close(LinkLost(reason, code=code, reason=reason))
            raise
        return link

    async def accept(self) -> Link:
        """Wait for the next inbound link.  Raises LinkLost once the transport is closed."""
        while not self._unaccepted:
            if self._closed:
                raise LinkLost("The transport is closed.", code=Code.SHUTDOWN)
            self._arrived.clear()
            await self._arrived.wait()
        return self._unaccepted.popleft()

    async def close(self) -> None:
        """End all handshakes, close every link (`Code.SHUTDOWN`) and wait until the peers know."""
        self._closed = True
        self._arrived.set()
        for task in tuple(self._inbound):
            task.cancel()
        links = tuple(self._links)
        await asyncio.gather(*[link.close(Code.SHUTDOWN, SHUTDOWN_REASON) for link in links])
        self._unaccepted.clear()

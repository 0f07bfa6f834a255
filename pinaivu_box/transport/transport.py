"""The interface between boxes and the network: transports make links, links carry streams of
frames.

`iroh_transport` implements it over QUIC; `link` has what does not depend on the carrier.  All
errors are `errors.PeeringError`s.  Whether a peer may have a link at all is for the caller to
decide once it has the link, with `close(Code.FORBIDDEN, ...)` if not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pinaivu_box.errors import LinkLost


def is_relay(address: str) -> bool:
    """Whether it is a relay's URL, and not HOST:PORT."""
    return address.startswith(("http://", "https://"))


@dataclass(frozen=True)
class LinkRoute:
    """How a peer is reached: directly or by a relay, and at which address."""

    direct: bool
    address: str
    rtt_ms: float | None  # the latest estimate, in whole milliseconds; None if there is none


@dataclass(frozen=True)
class LinkFacts:
    """`version`: the agreed one of the protocol.  `software`: what the peer says that it runs.
    `clock_ahead`: by how many seconds its clock was ahead of ours when the link began."""

    route: LinkRoute
    version: int
    software: str
    clock_ahead: float


class Stream(Protocol):
    """Frames both ways, in order: one conversation.

    It must be ended: by `finish` on both sides, or by `abandon`.  One task may send while another
    receives.  A receive that is cancelled loses nothing; a send that is cancelled abandons the
    stream, since a part of its frame may have gone out.
    """

    async def send(self, *frames: bytes) -> None:
        """Wait until the frames are on their way.  Raises LinkLost; ValueError if one is empty or
        over `wire.MAX_FRAME_BYTES`."""

    async def receive(self) -> bytes | None:
        """Wait for the next frame; returns None once the peer has finished.  Raises LinkLost if
        nothing more will come, and ProtocolError if what came is not a frame (then the link is
        closed)."""

    async def finish(self) -> None:
        """Send no more; the peer may go on.  Raises LinkLost."""

    def abandon(self) -> None:
        """Stop both directions at once; the peer sees LinkLost.  What is on its way may be lost."""


class Link(Protocol):
    """A link to one peer, which has proven its key."""

    @property
    def peer(self) -> str:
        """Its node id."""

    async def open(self) -> Stream:
        """Open a stream, which the peer sees with its first frame.  Waits while `wire.MAX_STREAMS`
        of ours are open, or a few less: the peer reports those that have ended in eighths of that.
        Raises LinkLost."""

    async def accept(self) -> Stream:
        """Wait for the next stream that the peer opens.  Raises LinkLost."""

    async def close(self, code: int, reason: str) -> None:
        """End all streams.  The peer gets code and reason, this cut at `wire.MAX_REASON_BYTES`."""

    async def closed(self) -> LinkLost:
        """Wait for the end; returns why."""

    def facts(self) -> LinkFacts: ...


class Transport(Protocol):
    @property
    def node_id(self) -> str: ...

    def addresses(self) -> list[str]:
        """Return how others may reach this box, nearest first: HOST:PORT, then a relay's URL."""

    async def wait_for_addresses(self) -> None:
        """Wait until `addresses` are complete: a relay is chosen, if there are several.  Not for
        long, since perhaps none of them answers."""

    async def connect(self, node_id: str, addresses: Sequence[str], timeout: float) -> Link:
        """Make a link.  Raises Unreachable, WrongPeer; LinkLost if the peer refused (`code`)."""

    async def accept(self) -> Link:
        """Wait for the next inbound link.  Raises LinkLost once the transport is closed."""

    async def close(self) -> None:
        """Close every link (`Code.SHUTDOWN`) and wait until the peers have been told."""

"""The seam between boxes and the network: transports make links, links carry streams of frames.

`iroh_transport` is the real one, `memory_transport` joins boxes of one process; `link` makes links
of either.  All errors are `errors.PeeringError`s.  Whether a peer may be linked to at all is for
the caller to decide once it has the link, with `close(Code.FORBIDDEN, ...)` if not.
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
    """How a peer is reached: directly or by a relay, and the address at its end."""

    direct: bool
    address: str
    rtt_ms: float | None  # the latest estimate, in whole milliseconds; None if there is none


@dataclass(frozen=True)
class LinkFacts:
    """`version` is of the protocol as agreed, `software` what the peer says to run, and
    `clock_ahead` by how many seconds its clock was before ours when the link began."""

    route: LinkRoute
    version: int
    software: str
    clock_ahead: float


class Stream(Protocol):
    """Frames both ways, in order: one request, or one conversation.

    It must be ended: by `finish` here and None from there, or by `abandon`.  One task may send
    while another receives.  A receive that is cancelled loses nothing; a send that is cancelled
    abandons the stream, since half of its frame may have gone out.
    """

    async def send(self, *frames: bytes) -> None:
        """Wait until they are on their way.  ValueError if one is empty or over
        `wire.MAX_FRAME_BYTES`; LinkLost."""

    async def receive(self) -> bytes | None:
        """The next frame; None once the peer has finished.  LinkLost if it has not and nothing
        more will come; ProtocolError if what came is no frame (then the link is closed)."""

    async def finish(self) -> None:
        """Our side says no more.  LinkLost."""

    def abandon(self) -> None:
        """Stop here, both ways; the peer sees LinkLost.  What is still under way may be lost."""


class Link(Protocol):
    """To one peer, which has proven its key.  The peer sees a stream with its first frame."""

    @property
    def peer(self) -> str:
        """Its node_id."""

    async def open(self) -> Stream:
        """A new stream.  Waits while `wire.MAX_STREAMS` of ours are open, or a few less: the peer
        tells of those that have ended in eighths of that.  LinkLost."""

    async def accept(self) -> Stream:
        """The next stream that the peer opened.  LinkLost."""

    async def close(self, code: int, reason: str) -> None:
        """End all streams.  The peer gets both, the reason cut at `wire.MAX_REASON_BYTES`."""

    async def closed(self) -> LinkLost:
        """Wait for the end; says why."""

    def facts(self) -> LinkFacts: ...


class Transport(Protocol):
    @property
    def node_id(self) -> str: ...

    def addresses(self) -> list[str]:
        """How others may reach us, nearest first: HOST:PORT, then a relay's URL."""

    async def settle(self) -> None:
        """Wait until `addresses` are whole: a relay is chosen, if there are several.  Not for long,
        for perhaps none of them answers."""

    async def connect(self, node_id: str, addresses: Sequence[str], timeout: float) -> Link:
        """Unreachable (says why), WrongPeer, or LinkLost if the peer refused us (`code`)."""

    async def accept(self) -> Link:
        """The next link that somebody made to us.  LinkLost once the transport is closed."""

    async def close(self) -> None:
        """Close every link (`Code.SHUTDOWN`) and wait until the peers have been told."""

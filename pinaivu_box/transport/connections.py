"""The links that stand and those that are being made: one to a peer, however many wish for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from random import Random
from typing import Any, Protocol
from weakref import WeakSet

from pinaivu_box.errors import LinkLost, PeeringError, WrongPeer
from pinaivu_box.transport.transport import Link, Stream, Transport
from pinaivu_box.transport.wire import REFUSED, Code

DIAL_SECONDS = 10.0
_SHORTEST, _LONGEST = 1.0, 60.0  # seconds until the next try
_POINTLESS = 300.0  # the same after a refusal
_YOUNG = 10.0  # seconds; two links as young as that were made at once
_SUCCESSION = 1.0  # seconds in which the peer has chosen between the two as well

log = logging.getLogger(__name__)


class OpenLink:
    """A link and what runs over it: `streams` of the peer's that are in use, and
    those that we have `opened` and not let go.  `since` in Unix seconds."""

    def __init__(self, link: Link, dialed: bool) -> None:
        self.link, self.dialed = link, dialed
        self.peer = link.peer
        self.since, self.began = time.time(), time.monotonic()
        self.streams = 0
        self.opened: WeakSet[Stream] = WeakSet()

    @property
    def idle(self) -> bool:
        return not self.streams and not self.opened


class LinkOwner(Protocol):
    def serve(self, held: OpenLink) -> None:
        """Take the streams that the peer opens."""

    def began(self, held: OpenLink) -> None: ...

    def ended(self, held: OpenLink, why: LinkLost) -> None: ...

    def addresses(self, peer: str) -> Sequence[str]: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...


class _LinkAttempt:
    """`until`, on the monotonic clock, is when a next try makes sense; `why` the last failed."""

    def __init__(self) -> None:
        self.failures, self.until, self.why = 0, 0.0, ""


class Links:
    def __init__(self, transport: Transport, owner: LinkOwner, random: Random) -> None:
        self.held: dict[str, OpenLink] = {}
        self._transport, self._owner, self._random = transport, owner, random
        self._dialing: dict[str, asyncio.Task[OpenLink]] = {}
        self._tried: dict[str, _LinkAttempt] = {}
        self._retiring: dict[str, OpenLink] = {}

    def __len__(self) -> int:
        return len(self.held.keys() | self._dialing.keys())

    def of(self, peer: str) -> list[OpenLink]:
        """Every one that stands, also if it is about to end."""
        found = (self.held.get(peer), self._retiring.get(peer))
        return [held for held in found if held is not None]

    def busy(self) -> set[str]:
        """Linked, being called, or not to be called yet."""
        now = time.monotonic()
        resting = {peer for peer, tried in self._tried.items() if tried.until > now}
        return self.held.keys() | self._dialing.keys() | resting

    def dialing(self, peer: str) -> bool:
        return peer in self._dialing

    def why(self, peer: str) -> str:
        """Why there is no link, as far as it is known."""
        tried = self._tried.get(peer)
        return tried.why if tried else ""

    async def get(self, peer: str) -> OpenLink:
        """The link to it, made if need be.  Unreachable, WrongPeer, LinkLost."""
        if held := self.held.get(peer):
            return held
        try:
            return await asyncio.shield(self.dial(peer))
        except PeeringError:
            if held := self.held.get(peer):  # it has called us meanwhile
                return held
            raise

    def dial(self, peer: str) -> asyncio.Task[OpenLink]:
        """Whoever wants a link while one is made waits for the same."""
        if peer not in self._dialing:
            task = asyncio.create_task(self._dial(peer))
            self._dialing[peer] = task
            task.add_done_callback(_look_at)
        return self._dialing[peer]

    async def _dial(self, peer: str) -> OpenLink:
        try:
            addresses = self._owner.addresses(peer)
            link = await self._transport.connect(peer, addresses, DIAL_SECONDS)
        except PeeringError as error:
            pointless = isinstance(error, WrongPeer) or _refused(error)
            self._rest(peer, error.message, pointless=pointless)
            raise
        finally:
            self._dialing.pop(peer, None)
        return self.add(link, dialed=True)

    async def accept(self) -> None:
        """Take links until the transport is closed."""
        while True:
            try:
                link = await self._transport.accept()
            except LinkLost:
                return
            self.add(link, dialed=False)

    def add(self, link: Link, *, dialed: bool) -> OpenLink:
        """The link that is kept, of this one and one that may stand already."""
        new, old = OpenLink(link, dialed), self.held.get(link.peer)
        if old is None:
            return self._hold(new)
        both = old.dialed != new.dialed and time.monotonic() - old.began <= _YOUNG
        if both and new.dialed != (self._transport.node_id < new.peer):
            self._owner.serve(new)
            self._owner.spawn(self._retire(new, "there is another link between the two"))
            return old
        self._end(old, LinkLost("Another link took its place.", code=Code.SECOND))
        if both:
            self._owner.spawn(self._retire(old, "another link took its place"))
        else:  # the peer was restarted, and this one leads nowhere
            self._owner.spawn(old.link.close(Code.SECOND, "another link took its place"))
        return self._hold(new)

    def _hold(self, new: OpenLink) -> OpenLink:
        self.held[new.peer] = new
        self._owner.spawn(self._watch(new))
        self._owner.serve(new)
        self._owner.began(new)
        return new

    async def _retire(self, held: OpenLink, why: str) -> None:
        """Both called at once, and both keep the link that the smaller id made.  The other one ends
        when the peer has had time to see that, and what runs over it has ended.  One at a time for
        each peer: else calling again and again would make many."""
        if held.peer not in self._retiring:
            self._retiring[held.peer] = held
            ended = asyncio.ensure_future(held.link.closed())
            try:
                await asyncio.wait([ended], timeout=_SUCCESSION)
                while not (held.idle or ended.done()):
                    await asyncio.wait([ended], timeout=_SUCCESSION)
            finally:
                del self._retiring[held.peer]
                ended.cancel()
        await held.link.close(Code.SECOND, why)

    async def _watch(self, held: OpenLink) -> None:
        why = await held.link.closed()
        if self.held.get(held.peer) is held:
            self._end(held, why)
            short = time.monotonic() - held.began < _YOUNG
            if held.dialed and why.code != Code.SECOND:
                self._rest(held.peer, why.message, pointless=_refused(why), fresh=not short)

    def _end(self, held: OpenLink, why: LinkLost) -> None:
        del self.held[held.peer]
        self._owner.ended(held, why)

    def _rest(self, peer: str, why: str, *, pointless: bool = False, fresh: bool = False) -> None:
        tried = self._tried.setdefault(peer, _LinkAttempt())
        seconds = min(_LONGEST, _SHORTEST * 2**tried.failures) if not fresh else _SHORTEST
        tried.failures = 0 if fresh else min(tried.failures + 1, 10)
        seconds = _POINTLESS if pointless else seconds
        # Boxes that lost each other together should not call each other together.
        tried.until = time.monotonic() + seconds * self._random.uniform(0.5, 1.5)
        tried.why = why
        log.debug("no link to %s: %s", peer, why)

    def forget(self) -> None:
        """Nobody is to be left alone any more."""
        self._tried.clear()


def _refused(error: PeeringError) -> bool:
    return isinstance(error, LinkLost) and error.code in REFUSED


def _look_at(task: asyncio.Task[OpenLink]) -> None:
    """Nobody may wait for it, and asyncio would complain."""
    if not task.cancelled():
        task.exception()

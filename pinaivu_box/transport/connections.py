"""The links of this box and those being made: one to each peer, however many callers ask for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from random import Random
from typing import Any, Protocol
from weakref import WeakSet

from pinaivu_box import backoff
from pinaivu_box.errors import LinkLost, PeeringError, WrongPeer
from pinaivu_box.tasks import ignore_exception
from pinaivu_box.transport.transport import Link, Stream, Transport
from pinaivu_box.transport.wire import REFUSED, Code

DIAL_SECONDS = 10.0
_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 1.0, 60.0
_REFUSED_BACKOFF_SECONDS = 300.0
_SIMULTANEOUS_SECONDS = 10.0  # two links no older than that were made at the same time
_RETIRE_SECONDS = 1.0  # in which the peer has chosen between the two as well

log = logging.getLogger(__name__)


class OpenLink:
    """A link and the streams over it: `inbound_streams` that the peer has opened, and those
    that we have opened and that are still referenced.  `since` in Unix seconds, `opened_at` on the
    monotonic clock; `dialed`: by this box."""

    def __init__(self, link: Link, dialed: bool) -> None:
        self.link, self.dialed = link, dialed
        self.peer = link.peer
        self.since, self.opened_at = time.time(), time.monotonic()
        self.inbound_streams = 0
        self.outbound_streams: WeakSet[Stream] = WeakSet()

    @property
    def idle(self) -> bool:
        return not self.inbound_streams and not self.outbound_streams


class LinkOwner(Protocol):
    """What the owner of the links is told and asked."""

    def serve_streams(self, link: OpenLink) -> None:
        """Serve the streams that the peer opens."""

    def link_opened(self, link: OpenLink) -> None: ...

    def link_closed(self, link: OpenLink, why: LinkLost) -> None: ...

    def addresses(self, peer: str) -> Sequence[str]:
        """Return where the peer may be, the most likely first."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> object:
        """Run something in the background."""


class _DialState:
    """`failures` in a row, the last of them because of `error`; `retry_at` on the monotonic
    clock."""

    def __init__(self) -> None:
        self.failures, self.retry_at, self.error = 0, 0.0, ""


class LinkManager:
    """`by_peer`: the links of this box, by node id."""

    def __init__(self, transport: Transport, owner: LinkOwner, random: Random) -> None:
        self.by_peer: dict[str, OpenLink] = {}
        self._transport, self._owner, self._random = transport, owner, random
        self._dialing: dict[str, asyncio.Task[OpenLink]] = {}
        self._dial_states: dict[str, _DialState] = {}
        self._retiring: dict[str, OpenLink] = {}

    def __len__(self) -> int:
        return len(self.by_peer.keys() | self._dialing.keys())

    def all_to(self, peer: str) -> list[OpenLink]:
        """Return every link to a peer, also one that is about to end."""
        links = (self.by_peer.get(peer), self._retiring.get(peer))
        return [link for link in links if link is not None]

    def not_to_dial(self) -> set[str]:
        """Return the peers that are linked, being dialed, or not to be dialed yet."""
        now = time.monotonic()
        waiting = {peer for peer, state in self._dial_states.items() if state.retry_at > now}
        return self.by_peer.keys() | self._dialing.keys() | waiting

    def is_dialing(self, peer: str) -> bool:
        return peer in self._dialing

    def last_error(self, peer: str) -> str:
        """Return why there is no link, as far as it is known."""
        state = self._dial_states.get(peer)
        return state.error if state else ""

    async def get(self, peer: str) -> OpenLink:
        """Return the link to a peer, made if need be.  Raises Unreachable, WrongPeer, LinkLost."""
        if link := self.by_peer.get(peer):
            return link
        try:
            return await asyncio.shield(self.dial(peer))
        except PeeringError:
            if link := self.by_peer.get(peer):  # it has dialed us meanwhile
                return link
            raise

    def dial(self, peer: str) -> asyncio.Task[OpenLink]:
        """Return the task that makes a link; all who want it while it is made get the same."""
        if peer not in self._dialing:
            task = asyncio.create_task(self._dial(peer))
            self._dialing[peer] = task
            task.add_done_callback(ignore_exception)
        return self._dialing[peer]

    async def _dial(self, peer: str) -> OpenLink:
        try:
            addresses = self._owner.addresses(peer)
            link = await self._transport.connect(peer, addresses, DIAL_SECONDS)
        except PeeringError as error:
            self._back_off(peer, error, refused=isinstance(error, WrongPeer) or _is_refusal(error))
            raise
        finally:
            self._dialing.pop(peer, None)
        return self.add(link, dialed=True)

    async def accept_links(self) -> None:
        """Accept links until the transport is closed."""
        while True:
            try:
                link = await self._transport.accept()
            except LinkLost:
                return
            self.add(link, dialed=False)

    def add(self, link: Link, *, dialed: bool) -> OpenLink:
        """Add a link, and return the one that is kept of this and an older one to the peer."""
        new, old = OpenLink(link, dialed), self.by_peer.get(link.peer)
        if old is None:
            return self._install(new)
        age = time.monotonic() - old.opened_at
        simultaneous = old.dialed != new.dialed and age <= _SIMULTANEOUS_SECONDS
        if simultaneous and new.dialed != (self._transport.node_id < new.peer):
            self._owner.serve_streams(new)
            self._owner.spawn(self._retire(new, "there is another link between the two"))
            return old
        self._remove(old, LinkLost("Another link took its place.", code=Code.SECOND))
        reason = "another link took its place"
        if simultaneous:
            self._owner.spawn(self._retire(old, reason))
        else:  # the peer was restarted, and the old link leads nowhere
            self._owner.spawn(old.link.close(Code.SECOND, reason))
        return self._install(new)

    def _install(self, link: OpenLink) -> OpenLink:
        self.by_peer[link.peer] = link
        self._owner.spawn(self._watch(link))
        self._owner.serve_streams(link)
        self._owner.link_opened(link)
        return link

    async def _retire(self, link: OpenLink, reason: str) -> None:
        """Close the second of two links that were made at the same time (both sides keep the one
        that the smaller node id made), as soon as the peer has had time to see that and no stream
        runs over it any more.  One at a time for each peer: else dialing again and again would make
        many."""
        if link.peer not in self._retiring:
            self._retiring[link.peer] = link
            closed = asyncio.ensure_future(link.link.closed())
            try:
                await asyncio.wait([closed], timeout=_RETIRE_SECONDS)
                while not (link.idle or closed.done()):
                    await asyncio.wait([closed], timeout=_RETIRE_SECONDS)
            finally:
                del self._retiring[link.peer]
                closed.cancel()
        await link.link.close(Code.SECOND, reason)

    async def _watch(self, link: OpenLink) -> None:
        why = await link.link.closed()
        if self.by_peer.get(link.peer) is link:
            self._remove(link, why)
            if link.dialed and why.code != Code.SECOND:
                was_stable = time.monotonic() - link.opened_at >= _SIMULTANEOUS_SECONDS
                self._back_off(link.peer, why, refused=_is_refusal(why), restart=was_stable)

    def _remove(self, link: OpenLink, why: LinkLost) -> None:
        del self.by_peer[link.peer]
        self._owner.link_closed(link, why)

    def _back_off(
        self, peer: str, error: PeeringError, *, refused: bool, restart: bool = False
    ) -> None:
        """Do not dial a peer for a time that grows with its failures in a row; `restart` counting
        them anew."""
        state = self._dial_states.setdefault(peer, _DialState())
        failures = 0 if restart else state.failures
        first, longest = (
            (_REFUSED_BACKOFF_SECONDS, _REFUSED_BACKOFF_SECONDS)
            if refused
            else (_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS)
        )
        state.retry_at = time.monotonic() + backoff.delay(
            failures + 1, first, longest, self._random
        )
        state.failures = 0 if restart else failures + 1
        state.error = error.message
        log.debug("no link to %s: %s", peer, error.message)

    def reset_backoff(self) -> None:
        """Every peer may be dialed at once."""
        self._dial_states.clear()


def _is_refusal(error: PeeringError) -> bool:
    return isinstance(error, LinkLost) and error.code in REFUSED

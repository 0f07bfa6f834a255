"""The links of this box and those being made: one to each peer, however many callers ask for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import Protocol

from pinaivu_box import backoff
from pinaivu_box.errors import LinkLost, PeeringError, WrongPeer
from pinaivu_box.tasks import TaskSet, ignore_exception
from pinaivu_box.transport.link import Link, Stream
from pinaivu_box.transport.streams import StreamRouter
from pinaivu_box.transport.transport import Transport
from pinaivu_box.transport.wire import REFUSED, Code, Open

DIAL_SECONDS = 10.0
_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 1.0, 60.0
_REFUSED_BACKOFF_SECONDS = 300.0
_SIMULTANEOUS_SECONDS = 10.0  # two links no older than that were made at the same time
_RETIRE_SECONDS = 1.0  # in which the peer has chosen between the two as well

log = logging.getLogger(__name__)


class LinkOwner(Protocol):
    """Who is notified of links, and knows where peers are."""

    def link_opened(self, link: Link) -> None: ...

    def link_closed(self, link: Link, why: LinkLost) -> None: ...

    def addresses(self, peer: str) -> Sequence[str]:
        """Return where the peer may be, the most likely first."""


class _DialState:
    """`failures` in a row, the last of them because of `error`; `retry_at` on the monotonic
    clock."""

    def __init__(self) -> None:
        self.failures, self.retry_at, self.error = 0, 0.0, ""


class LinkManager:
    """`by_peer`: the links of this box, by node id.  Streams that peers open go to `router`; what
    runs beside the caller is in `tasks`."""

    def __init__(
        self,
        transport: Transport,
        owner: LinkOwner,
        router: StreamRouter,
        tasks: TaskSet,
        random: Random,
    ) -> None:
        self.by_peer: dict[str, Link] = {}
        self._transport, self._owner, self._router = transport, owner, router
        self._spawn, self._random = tasks.spawn, random
        self._dialing: dict[str, asyncio.Task[Link]] = {}
        self._dial_states: dict[str, _DialState] = {}
        self._retiring: dict[str, Link] = {}

    def __len__(self) -> int:
        return len(self.by_peer.keys() | self._dialing.keys())

    def close(self, peer: str, code: Code, reason: str) -> None:
        """Close every link to a peer, also one that is about to end."""
        for links in (self.by_peer, self._retiring):
            if link := links.get(peer):
                self._spawn(link.close(code, reason))

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

    async def open(self, peer: str, opening: Open) -> Stream:
        """Open a stream to a peer, over a new link if there is none.  Raises Unreachable,
        WrongPeer, LinkLost."""
        while True:
            link = await self._get(peer)
            try:
                return await link.open(opening)
            except LinkLost:
                if self.by_peer.get(peer) in (link, None):
                    raise  # else it was replaced by another one

    async def _get(self, peer: str) -> Link:
        if link := self.by_peer.get(peer):
            return link
        try:
            return await asyncio.shield(self.dial(peer))
        except PeeringError:
            if link := self.by_peer.get(peer):  # it has dialed us meanwhile
                return link
            raise

    def dial(self, peer: str) -> asyncio.Task[Link]:
        """Return the task that makes a link; all who want it while it is made get the same."""
        if peer not in self._dialing:
            task = asyncio.create_task(self._dial(peer))
            self._dialing[peer] = task
            task.add_done_callback(ignore_exception)
        return self._dialing[peer]

    async def _dial(self, peer: str) -> Link:
        try:
            addresses = self._owner.addresses(peer)
            link = await self._transport.connect(peer, addresses, DIAL_SECONDS)
        except PeeringError as error:
            self._back_off(peer, error)
            raise
        finally:
            self._dialing.pop(peer, None)
        return self.add(link)

    async def accept_links(self) -> None:
        """Accept links until the transport is closed."""
        while True:
            try:
                link = await self._transport.accept()
            except LinkLost:
                return
            self.add(link)

    def add(self, new: Link) -> Link:
        """Add a link, and return the one that is kept of this and an older one to the peer."""
        old = self.by_peer.get(new.peer)
        if old is None:
            return self._install(new)
        age = time.monotonic() - old.opened_at
        simultaneous = old.dialed != new.dialed and age <= _SIMULTANEOUS_SECONDS
        if simultaneous and new.dialed != (self._transport.node_id < new.peer):
            self._spawn(self._serve(new))
            self._spawn(self._retire(new, "there is another link between the two"))
            return old
        self._remove(old, LinkLost("Another link took its place.", code=Code.SECOND))
        reason = "another link took its place"
        if simultaneous:
            self._spawn(self._retire(old, reason))
        else:  # the peer was restarted, and the old link leads nowhere
            self._spawn(old.close(Code.SECOND, reason))
        return self._install(new)

    def _install(self, link: Link) -> Link:
        self.by_peer[link.peer] = link
        self._spawn(self._serve(link))
        self._owner.link_opened(link)
        return link

    async def _serve(self, link: Link) -> None:
        """Serve the streams that the peer opens, until the link ends."""
        with suppress(LinkLost):
            while True:
                self._spawn(self._router.handle(await link.accept()))
        why = await link.closed()
        if self.by_peer.get(link.peer) is link:
            self._remove(link, why)
            if link.dialed and why.code != Code.SECOND:
                was_stable = time.monotonic() - link.opened_at >= _SIMULTANEOUS_SECONDS
                self._back_off(link.peer, why, restart=was_stable)

    async def _retire(self, link: Link, reason: str) -> None:
        """Close the second of two links that were made at the same time (both sides keep the one
        that the smaller node id made), as soon as the peer has had time to see that and no stream
        runs over it any more.  One at a time for each peer: else dialing again and again would make
        many."""
        if link.peer not in self._retiring:
            self._retiring[link.peer] = link
            closed = asyncio.ensure_future(link.closed())
            try:
                await asyncio.wait([closed], timeout=_RETIRE_SECONDS)
                while link.streams and not closed.done():
                    await asyncio.wait([closed], timeout=_RETIRE_SECONDS)
            finally:
                del self._retiring[link.peer]
                closed.cancel()
        await link.close(Code.SECOND, reason)

    def _remove(self, link: Link, why: LinkLost) -> None:
        del self.by_peer[link.peer]
        self._owner.link_closed(link, why)

    def _back_off(self, peer: str, error: PeeringError, *, restart: bool = False) -> None:
        """Do not dial a peer for a time that grows with its failures in a row; `restart` counting
        them anew."""
        state = self._dial_states.setdefault(peer, _DialState())
        failures = 0 if restart else state.failures
        first, longest = _FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS
        if isinstance(error, WrongPeer) or (isinstance(error, LinkLost) and error.code in REFUSED):
            first = longest = _REFUSED_BACKOFF_SECONDS
        delay = backoff.delay(failures + 1, first, longest, self._random)
        state.retry_at = time.monotonic() + delay
        state.failures = 0 if restart else failures + 1
        state.error = error.message
        log.debug("no link to %s: %s", peer, error.message)

    def reset_backoff(self) -> None:
        """Every peer may be dialed at once."""
        self._dial_states.clear()

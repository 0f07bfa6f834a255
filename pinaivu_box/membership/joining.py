"""The conversation `join`: a newcomer shows a ticket's secret and gets its certificate."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

from msgspec import Meta, Struct, convert, msgpack

from pinaivu_box.errors import LinkLost, NotJoined, PeeringError, ProtocolError, Unreachable
from pinaivu_box.identity import Identity
from pinaivu_box.membership.records import Name, Record, network_of
from pinaivu_box.membership.roster import Roster
from pinaivu_box.membership.store import MembershipStore
from pinaivu_box.membership.tickets import (
    Invitation,
    Secret,
    Ticket,
    TicketInvalid,
    TicketRefused,
    decode,
    invite,
    redeem,
    secret_hash,
)
from pinaivu_box.receipts.receipt import utc_text
from pinaivu_box.store import peers as store
from pinaivu_box.store.audit import Actor, record
from pinaivu_box.store.database import Database
from pinaivu_box.store.peers import TicketRow
from pinaivu_box.transport import streams, wire
from pinaivu_box.transport.connections import DIAL_SECONDS
from pinaivu_box.transport.streams import Open, OpenedStream
from pinaivu_box.transport.transport import Link, Stream, Transport
from pinaivu_box.transport.wire import Code

PURPOSE = "join"
_JOIN_SECONDS = 20.0
_AGAIN_SECONDS = 0.5
_WHOLE = 500  # records of a roster that goes to a newcomer at once, about 200 kB


class JoinRequest(Struct, frozen=True, tag="Join"):
    """`name` is what the newcomer calls itself; the ticket may say otherwise."""

    secret: Secret
    name: Name


class Welcome(Struct, frozen=True, tag="Welcome"):
    """The roster, or of a large one what shows that the newcomer is a member."""

    records: Annotated[tuple[Record, ...], Meta(max_length=_WHOLE)]


_join = msgpack.Decoder(JoinRequest)
_welcome = msgpack.Decoder(Welcome)


async def ask(transport: Transport, ticket: Ticket, name: str) -> tuple[Link, Roster]:
    """The link to the inviter, and the roster of the network that it has let us into.

    Unreachable, WrongPeer; PeerRefused with the inviter's sentence; LinkLost, ProtocolError.
    """
    for last in (False, False, True):
        link = await transport.connect(ticket.node_id, ticket.addresses, DIAL_SECONDS)
        try:
            async with asyncio.timeout(_JOIN_SECONDS):
                return link, await _ask(link, transport.node_id, ticket, name)
        except TimeoutError as error:
            await link.close(Code.SILENT, "it did not answer a newcomer")
            raise Unreachable("The inviter does not answer: try again.") from error
        except PeeringError as error:
            await link.close(Code.SHUTDOWN, "it is not joining")
            # To the inviter, who asks again may be a member that it calls at the same time.
            if last or not (isinstance(error, LinkLost) and error.code == Code.SECOND):
                raise
        await asyncio.sleep(_AGAIN_SECONDS)
    raise AssertionError("the last try has ended")


async def _ask(link: Link, me: str, ticket: Ticket, name: str) -> Roster:
    stream = OpenedStream(link.peer, await link.open(), Open(PURPOSE))
    await stream.send(wire.encode(JoinRequest(ticket.secret, name)))
    await stream.finish()
    answer = wire.decode(await stream.receive() or b"", _welcome)
    await stream.receive()
    roster = Roster(ticket.network_id)
    if roster.admit(answer.records).forged or not {me, link.peer} <= roster.members().keys():
        raise ProtocolError(
            f"{wire.short(link.peer)} sent a certificate that does not make this box a member: "
            "ask for a new ticket, or another box for one."
        )
    return roster


class JoinHandler:
    """Lets others into the network of this box, or puts them out; founds one with the first ticket.

    What it returns is on disk, and for the caller to spread.
    """

    def __init__(self, identity: Identity, standing: MembershipStore, database: Database) -> None:
        self._identity, self._standing, self._database = identity, standing, database
        self._me = identity.node_id
        self._one = asyncio.Lock()  # newcomer at a time: uses are counted

    async def found(self, name: str) -> None:
        """A network of this box alone; its own certificate tells others its name."""
        roster = Roster(network_of(self._me, secrets.token_bytes(4)))
        roster.certify(self._identity, self._me, name, time.time(), admin=True)
        await self._standing.enter(roster)

    def read(self, text: str) -> Ticket:
        """A ticket that this box may redeem.  NotJoined."""
        try:
            ticket = decode(text)
        except TicketInvalid as error:
            raise NotJoined(str(error)) from error
        if ticket.node_id == self._me:
            raise NotJoined("This ticket is of this box itself: redeem it on another one.")
        standing, roster = self._standing, self._standing.roster
        if (
            roster is not None
            and roster.network != ticket.network_id
            and standing.has(self._me)
            and len(roster.members()) > 1
        ):
            raise NotJoined(
                "This box belongs to a network with others: leave that first, with 'pinaivu peers "
                "leave'."
            )
        return ticket

    async def invite(
        self,
        addresses: Sequence[str],
        name: str | None,
        seconds: float,
        uses: int,
        admin: bool,
        by: Actor,
    ) -> str:
        """A ticket's text.  NotJoined."""
        roster = self._standing.roster
        assert roster is not None
        if (why := roster.may_invite(self._me, admin=admin)) is not None:
            raise NotJoined(_sentence(why))
        try:
            if name is not None:
                convert(name, Name)
            text, kept = invite(
                self._me, roster.network, addresses, now=time.time(), seconds=seconds, uses=uses,
                name=name, admin=admin,
            )  # fmt: skip
        except ValueError as error:
            raise NotJoined(_sentence(str(error))) from error
        row = TicketRow(kept.secret_sha256, name, kept.expires_at, uses, admin)
        told = {"name": name, "expires_at": utc_text(kept.expires_at), "uses": uses, "admin": admin}
        await store.add_ticket(
            self._database, row, record(by, "peer.invite", roster.network, **told)
        )
        return text

    async def welcome(self, newcomer: str, stream: Stream) -> list[Record]:
        """The inviter's side of the conversation; returns what is new to the roster.
        LinkLost, ProtocolError, TimeoutError."""
        async with asyncio.timeout(_JOIN_SECONDS):
            asked = wire.decode(await stream.receive() or b"", _join)
        try:
            async with self._one:
                answer, new = await self._certify(newcomer, asked)
        except TicketRefused as error:
            await streams.refuse(stream, Code.FORBIDDEN, str(error))
            return []
        with suppress(LinkLost):  # it is a member all the same, and may ask again
            await stream.send(wire.encode(answer))
            await stream.finish()
            await streams.drain(stream)
        return new

    async def _certify(self, newcomer: str, asked: JoinRequest) -> tuple[Welcome, list[Record]]:
        """Raises Refused."""
        digest, now = secret_hash(asked.secret), time.time()
        row = await store.ticket(self._database, digest)
        invitation = redeem(row and _invitation(row), asked.secret, newcomer, now)
        roster = self._standing.roster
        assert roster is not None  # there are no tickets without one
        # A ticket that it had before must not bring it back.
        if roster.revoked(newcomer) and not (self._me == roster.founder and row and row.newest):
            raise TicketRefused(
                f"This box was put out of the network ({roster.member(newcomer).why}): only a new "
                "ticket of the network's founder brings it back."
            )
        # Before the certificate: if we stop here, it asks again, and that is no second use.
        await store.use_ticket(self._database, digest, newcomer)
        new: list[Record] = []
        if newcomer not in roster.members():
            name, admin = invitation.name or asked.name, invitation.admin
            try:
                new.append(roster.certify(self._identity, newcomer, name, now, admin=admin))
            except ValueError as error:
                raise TicketRefused(f"The inviter cannot let this box in: {error}.") from error
            await self._standing.keep()
        whole = len(roster) <= _WHOLE
        return Welcome(tuple(roster.records() if whole else roster.proof(newcomer))), new

    async def revoke(self, node_id: str, name: str, reason: str, by: Actor) -> list[Record]:
        """NotJoined if this box may not."""
        roster = self._standing.roster
        assert roster is not None
        try:
            made = roster.revoke(self._identity, node_id, time.time(), reason)
        except ValueError as error:
            raise NotJoined(_sentence(str(error))) from error
        await self._standing.keep(record(by, "peer.revoke", node_id, name=name, reason=reason))
        return [made]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _invitation(row: TicketRow) -> Invitation:
    return Invitation(
        row.secret_sha256, row.name, row.expires_at, row.uses, row.used_by, row.admin,
        row.made_at / 1000,
    )  # fmt: skip

"""The protocol `join`: a newcomer shows a ticket's secret and gets its certificate."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct, convert, msgpack

from pinaivu_box.changes import Changes
from pinaivu_box.errors import LinkLost, NotJoined, PeeringError, ProtocolError, Unreachable
from pinaivu_box.identity import Identity
from pinaivu_box.membership import tickets
from pinaivu_box.membership.records import Name, Record, network_of
from pinaivu_box.membership.roster import Roster
from pinaivu_box.membership.store import MembershipStore
from pinaivu_box.membership.tickets import Secret, Ticket, TicketInvalid, TicketRefused
from pinaivu_box.store import peers as store
from pinaivu_box.store.audit import Actor, record
from pinaivu_box.store.database import Database
from pinaivu_box.text import sentence, utc_text
from pinaivu_box.transport import streams, wire
from pinaivu_box.transport.connections import DIAL_SECONDS
from pinaivu_box.transport.link import Link, Stream
from pinaivu_box.transport.rpc import MessageStream
from pinaivu_box.transport.transport import Transport
from pinaivu_box.transport.wire import Code, Open

PURPOSE = "join"
MAX_WELCOME_RECORDS = 500  # of a roster that goes to a newcomer at once, about 200 kB
_JOIN_SECONDS = 20.0
_RETRY_SECONDS = 0.5
_ATTEMPTS = 3


class JoinRequest(Struct, frozen=True, tag="Join"):
    """`name` is what the newcomer calls itself; the ticket may say otherwise."""

    secret: Secret
    name: Name


class Welcome(Struct, frozen=True, tag="Welcome"):
    """The roster; of a large one the certificates that make the newcomer a member."""

    records: Annotated[tuple[Record, ...], Meta(max_length=MAX_WELCOME_RECORDS)]


_join_requests = msgpack.Decoder(JoinRequest)
_welcomes = msgpack.Decoder(Welcome)


async def redeem_at_inviter(transport: Transport, ticket: Ticket, name: str) -> tuple[Link, Roster]:
    """Join the network that a ticket is for.

    Returns the link to the inviter and the network's roster.  Raises Unreachable, WrongPeer,
    PeerRefused with the inviter's sentence, LinkLost, ProtocolError.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        link = await transport.connect(ticket.node_id, ticket.addresses, DIAL_SECONDS)
        try:
            async with asyncio.timeout(_JOIN_SECONDS):
                return link, await _request_certificate(link, transport.node_id, ticket, name)
        except TimeoutError as error:
            await link.close(Code.SILENT, "it did not answer a newcomer")
            raise Unreachable("The inviter does not answer: try again.") from error
        except PeeringError as error:
            await link.close(Code.SHUTDOWN, "it is not joining")
            # To the inviter, who asks again may be a member that it is dialing at the same time.
            second = isinstance(error, LinkLost) and error.code == Code.SECOND
            if attempt == _ATTEMPTS or not second:
                raise
        await asyncio.sleep(_RETRY_SECONDS)
    raise AssertionError("the last attempt returns or raises")


async def _request_certificate(link: Link, me: str, ticket: Ticket, name: str) -> Roster:
    stream = await link.open(Open(PURPOSE))
    messages = MessageStream[JoinRequest, Welcome](
        link.peer, stream, _welcomes, receive_seconds=_JOIN_SECONDS
    )
    async with messages:
        welcome = await messages.call(JoinRequest(ticket.secret, name), Welcome)
    roster = Roster(ticket.network_id)
    if roster.admit(welcome.records).forged or not {me, link.peer} <= roster.members().keys():
        raise ProtocolError(
            f"{wire.short(link.peer)} sent a certificate that does not make this box a member: "
            "ask for a new ticket, or another box for one."
        )
    return roster


class JoinHandler:
    """Lets newcomers into the network of this box and revokes members; founds a network.

    The records that it returns are on disk, and for the caller to spread.
    """

    def __init__(self, identity: Identity, membership: MembershipStore, database: Database) -> None:
        self._identity, self._membership, self._database = identity, membership, database
        self._me = identity.node_id
        self._redeeming = asyncio.Lock()  # one newcomer at a time: uses are counted
        self._asking: Counter[str] = Counter()  # newcomers whose requests are being answered
        self._answers = Changes()

    async def found_network(self, name: str) -> None:
        """Found a network of this box alone; its own certificate tells others its name."""
        roster = Roster(network_of(self._me, secrets.token_bytes(4)))
        roster.certify(self._identity, self._me, name, time.time(), admin=True)
        await self._membership.enter(roster)

    def read_ticket(self, text: str) -> Ticket:
        """Read a ticket that this box may redeem.  Raises NotJoined."""
        try:
            ticket = tickets.decode(text)
        except TicketInvalid as error:
            raise NotJoined(str(error)) from error
        if ticket.node_id == self._me:
            raise NotJoined("This box made the ticket itself: redeem it on another one.")
        membership, roster = self._membership, self._membership.roster
        if (
            roster is not None
            and roster.network != ticket.network_id
            and membership.is_member(self._me)
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
        """Make a ticket and return its text.  Raises NotJoined if this box may not."""
        roster = self._membership.roster
        assert roster is not None
        try:
            roster.check_may_invite(self._me, admin=admin)
            if name is not None:
                convert(name, Name)
            text, invitation = tickets.invite(
                self._me, roster.network, addresses, now=time.time(), seconds=seconds, uses=uses,
                name=name, admin=admin,
            )  # fmt: skip
        except ValueError as error:
            raise NotJoined(sentence(str(error))) from error
        expires = utc_text(invitation.expires_at)
        entry = {"name": name, "expires_at": expires, "uses": uses, "admin": admin}
        await store.add_ticket(
            self._database, invitation, record(by, "peer.invite", roster.network, **entry)
        )
        return text

    async def handle(self, newcomer: str, stream: Stream) -> list[Record]:
        """Answer a newcomer, and return what is new to the roster.  Raises LinkLost,
        ProtocolError, TimeoutError."""
        messages = MessageStream[Welcome, JoinRequest](
            newcomer, stream, _join_requests, receive_seconds=_JOIN_SECONDS
        )
        request = await messages.expect(JoinRequest)
        self._asking[newcomer] += 1
        try:
            async with self._redeeming:
                welcome, new = await self._certify(newcomer, request)
        except TicketRefused as error:
            await streams.refuse(stream, Code.FORBIDDEN, str(error))
            return []
        finally:
            self._asking[newcomer] -= 1
            self._asking += Counter()  # drops those at 0
            self._answers.notify()
        await messages.end_with(welcome)  # if that is lost, it is a member and may ask again
        return new

    async def answered(self, newcomer: str) -> bool:
        """Wait for the answer to a newcomer whose request has come, as long as it waits itself;
        returns whether there was one to wait for."""
        if newcomer not in self._asking:
            return False
        await self._answers.until(lambda: newcomer not in self._asking, _JOIN_SECONDS)
        return True

    async def _certify(self, newcomer: str, request: JoinRequest) -> tuple[Welcome, list[Record]]:
        """Make a newcomer a member.  Raises TicketRefused."""
        digest, now = tickets.secret_hash(request.secret), time.time()
        invitation = await store.ticket(self._database, digest)
        redeemed = tickets.redeem(invitation, request.secret, newcomer, now)
        roster = self._membership.roster
        assert roster is not None  # there are no tickets without one
        # A ticket that it had before must not bring it back.
        if roster.revoked(newcomer) and not (self._me == roster.founder and redeemed.newest):
            raise TicketRefused(
                f"This box was removed from the network ({roster.member(newcomer).why}): only a "
                "new ticket of the network's founder brings it back."
            )
        # Before the certificate: if this box stops here, the newcomer's next request is no second
        # use.
        await store.use_ticket(self._database, digest, newcomer)
        new: list[Record] = []
        if newcomer not in roster.members():
            name, admin = redeemed.name or request.name, redeemed.admin
            try:
                new.append(roster.certify(self._identity, newcomer, name, now, admin=admin))
            except ValueError as error:
                raise TicketRefused(f"The inviter cannot let this box in: {error}.") from error
            await self._membership.save()
        fits = len(roster) <= MAX_WELCOME_RECORDS
        return Welcome(tuple(roster.records() if fits else roster.proof(newcomer))), new

    async def revoke(self, node_id: str, name: str, reason: str, by: Actor) -> Record:
        """Revoke a box.  Raises NotJoined if this box may not."""
        roster = self._membership.roster
        assert roster is not None
        try:
            revocation = roster.revoke(self._identity, node_id, time.time(), reason)
        except ValueError as error:
            raise NotJoined(sentence(str(error))) from error
        await self._membership.save(record(by, "peer.revoke", node_id, name=name, reason=reason))
        return revocation

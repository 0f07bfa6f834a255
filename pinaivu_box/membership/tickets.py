"""Tickets: what an operator carries from one box to another so that the two find each other.

A ticket is `pnv1` and lower-case base32 of msgpack with a checksum before it.  It names the
inviter's key, so whoever answers at its addresses must prove to be that box; and it holds a
one-time secret, so that box must be shown it.  The inviter keeps the secret's hash only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from collections.abc import Sequence
from typing import Annotated

from msgspec import DecodeError, Meta, Struct, msgpack
from msgspec.structs import replace

from pinaivu_box.membership.records import (
    NETWORK_PREFIX,
    Counter,
    Key,
    NetworkKey,
    key_of,
    network_key,
    node_of,
)
from pinaivu_box.text import number, whole

PREFIX = "pnv1"
MAX_TICKET_CHARACTERS = 2048
MAX_ADDRESSES = 8
MAX_USES = 1000
_SECRET_BYTES = 16
_CHECKSUM_BYTES = 4
_CLOCK_SLACK = 300.0  # seconds that a clock is set back without harm

Address = Annotated[str, Meta(min_length=1, max_length=100, pattern=whole("[!-~]+"))]
Secret = Annotated[bytes, Meta(min_length=_SECRET_BYTES, max_length=_SECRET_BYTES)]


class TicketInvalid(ValueError):
    """A text that is no ticket, or no longer; one sentence for whoever pasted it."""


class Ticket(Struct, frozen=True, array_like=True):
    """`expires_at` in Unix seconds by the inviter's clock, which alone decides."""

    inviter: Key
    network: NetworkKey
    secret: Secret
    expires_at: Counter
    addresses: Annotated[tuple[Address, ...], Meta(max_length=MAX_ADDRESSES)]

    @property
    def node_id(self) -> str:
        return node_of(self.inviter)

    @property
    def network_id(self) -> str:
        return NETWORK_PREFIX + self.network.hex()


class Invitation(Struct, frozen=True):
    """What the inviter keeps of a ticket.  `redeemed_by`: the node ids that have used it.
    `admin`: whether they may invite and revoke as an admin does.  `made_at`: Unix seconds."""

    secret_sha256: str
    name: str | None
    expires_at: int
    uses: int
    redeemed_by: tuple[str, ...] = ()
    admin: bool = False
    made_at: float = 0.0


class TicketRefused(ValueError):
    """A ticket that the inviter does not take; one sentence for the operator of the newcomer."""


def invite(
    inviter: str,
    network: str,
    addresses: Sequence[str],
    *,
    now: float,
    seconds: float,
    uses: int = 1,
    name: str | None = None,
    admin: bool = False,
) -> tuple[str, Invitation]:
    """The ticket's text, which nobody sees again, and what the inviter keeps.

    Raises ValueError.
    """
    if not 1 <= uses <= MAX_USES:
        raise ValueError(f"a ticket is for 1 to {MAX_USES} uses, not {uses}")
    if seconds <= 0:
        raise ValueError("a ticket must be good for some time, for example 1h")
    secret = secrets.token_bytes(_SECRET_BYTES)
    ends = round(now + seconds)
    found = tuple(addresses)[:MAX_ADDRESSES]
    ticket = Ticket(key_of(inviter), network_key(network), secret, ends, found)
    return encode(ticket), Invitation(secret_hash(secret), name, ends, uses, (), admin)


def encode(ticket: Ticket) -> str:
    body = msgpack.encode(ticket)
    return PREFIX + base64.b32encode(_checksum(body) + body).decode().rstrip("=").lower()


def decode(text: str) -> Ticket:
    """Spaces, line breaks and capitals do not matter: a ticket may come from a letter or a QR code.

    Raises TicketInvalid.
    """
    if len(text) > 2 * MAX_TICKET_CHARACTERS:
        raise TicketInvalid("This is no ticket: it is too long.")
    given = "".join(text.split())
    if not given.isascii():  # capitals of other scripts may become ASCII
        raise TicketInvalid("This ticket is damaged: copy the whole of it again.")
    given = given.lower()
    if not given.startswith(PREFIX):
        newer = given[:3] == "pnv" and number(given[3:4]) is not None
        raise TicketInvalid(
            "This ticket is of another version: bring both boxes to the same version of Pinaivu."
            if newer
            else f"This is no ticket: a ticket begins with {PREFIX}."
        )
    body = _checked(given.removeprefix(PREFIX))
    try:
        return msgpack.decode(body, type=Ticket)
    except (DecodeError, ValueError, RecursionError):
        raise TicketInvalid("This is no ticket: its content makes no sense.") from None


def _checked(code: str) -> bytes:
    """The bytes that a ticket's letters stand for, without the checksum."""
    try:
        if len(code) > MAX_TICKET_CHARACTERS:
            raise ValueError
        raw = base64.b32decode(code.upper() + "=" * (-len(code) % 8))
    except (binascii.Error, ValueError):
        raise TicketInvalid("This ticket is damaged: copy the whole of it again.") from None
    found, body = raw[:_CHECKSUM_BYTES], raw[_CHECKSUM_BYTES:]
    if found != _checksum(body):
        raise TicketInvalid(
            "This ticket has a wrong checksum: a letter is missing or wrong, copy it again."
        )
    return body


def redeem(invitation: Invitation | None, secret: bytes, node_id: str, now: float) -> Invitation:
    """The invitation after `node_id` has used it.  Raises Refused.

    A newcomer that lost our answer may ask again: that is no second use.  The caller looks the
    invitation up by `secret_hash(secret)` and must write the result before it certifies anybody.
    """
    if invitation is None or invitation.secret_sha256 != secret_hash(secret):
        raise TicketRefused("This box knows no such ticket: it was withdrawn, or never given.")
    if node_id in invitation.redeemed_by:
        return invitation
    if now < invitation.made_at - _CLOCK_SLACK:  # or one for an hour would be good until then
        raise TicketRefused(
            "By this box's clock this ticket is from the future: its clock is wrong, or was. Ask "
            "for a new one with pinaivu peers invite."
        )
    if now >= invitation.expires_at:
        raise TicketRefused("This ticket has expired: ask for a new one with pinaivu peers invite.")
    if len(invitation.redeemed_by) >= invitation.uses:
        raise TicketRefused(
            "This ticket was used already: ask for a new one with pinaivu peers invite."
        )
    return replace(invitation, redeemed_by=(*invitation.redeemed_by, node_id))


def secret_hash(secret: bytes) -> str:
    """By which the inviter finds its invitation; 128 random bits need no salt."""
    return hashlib.sha256(secret).hexdigest()


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM_BYTES]

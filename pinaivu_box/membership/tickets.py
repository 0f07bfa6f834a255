"""Tickets: what an operator carries from one box to another so that the two find each other.

A ticket is `pnv1` and lower-case base32 of msgpack with a checksum before it.  It contains the
inviter's key, so a box that answers at its addresses has to prove that it is the inviter; and a
one-time secret, which gives the newcomer the right to join.  The inviter keeps the secret's hash.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from collections.abc import Sequence
from typing import Annotated

from msgspec import DecodeError, Meta, Struct, msgpack

from pinaivu_box.membership.records import (
    NETWORK_PREFIX,
    Counter,
    Key,
    NetworkKey,
    key_of,
    network_key,
    node_of,
)
from pinaivu_box.store.peers import Invitation
from pinaivu_box.text import number, whole

PREFIX = "pnv1"
MAX_TICKET_CHARACTERS = 2048
MAX_ADDRESSES = 8
MAX_USES = 1000
_SECRET_BYTES = 16
_CHECKSUM_BYTES = 4
_CLOCK_TOLERANCE_MS = 300_000  # that the inviter's clock may be set back without harm

Address = Annotated[str, Meta(min_length=1, max_length=100, pattern=whole("[!-~]+"))]
Secret = Annotated[bytes, Meta(min_length=_SECRET_BYTES, max_length=_SECRET_BYTES)]


class TicketInvalid(ValueError):
    """A text that is not a ticket; says why, in a sentence for who has pasted it."""


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


class TicketRefused(ValueError):
    """A ticket that the inviter does not accept; one sentence for the newcomer's operator."""


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
    """Make a ticket that expires `seconds` from `now` (Unix seconds).

    Returns its text, which is shown once, and what the inviter keeps.  Raises ValueError.
    """
    if not 1 <= uses <= MAX_USES:
        raise ValueError(f"a ticket is for 1 to {MAX_USES} uses, not {uses}")
    if seconds <= 0:
        raise ValueError("a ticket must be valid for some time, for example 1h")
    secret = secrets.token_bytes(_SECRET_BYTES)
    expires_at = round(now + seconds)
    ticket = Ticket(
        key_of(inviter), network_key(network), secret, expires_at, tuple(addresses)[:MAX_ADDRESSES]
    )
    return encode(ticket), Invitation(secret_hash(secret), name, expires_at, uses, admin)


def encode(ticket: Ticket) -> str:
    """Return the ticket's text."""
    body = msgpack.encode(ticket)
    return PREFIX + base64.b32encode(_checksum(body) + body).decode().rstrip("=").lower()


def decode(text: str) -> Ticket:
    """Read a ticket's text; spaces, line breaks and case do not matter, since it may come from a
    letter or a QR code.  Raises TicketInvalid.
    """
    if len(text) > 2 * MAX_TICKET_CHARACTERS:
        raise TicketInvalid("This is not a ticket: it is too long.")
    compact = "".join(text.split())
    if not compact.isascii():  # capitals of other scripts may become ASCII
        raise TicketInvalid("This ticket is damaged: copy the whole of it again.")
    compact = compact.lower()
    if not compact.startswith(PREFIX):
        other_version = compact[:3] == "pnv" and number(compact[3:4]) is not None
        raise TicketInvalid(
            "This ticket has another version: update the older of the two boxes."
            if other_version
            else f"This is not a ticket: a ticket begins with {PREFIX}."
        )
    body = _checked(compact.removeprefix(PREFIX))
    try:
        return msgpack.decode(body, type=Ticket)
    except (DecodeError, ValueError, RecursionError):
        raise TicketInvalid("This is not a ticket: its content is not valid.") from None


def _checked(code: str) -> bytes:
    """Return the bytes that a ticket's letters stand for, without the checksum.  Raises
    TicketInvalid."""
    try:
        if len(code) > MAX_TICKET_CHARACTERS:
            raise ValueError
        raw = base64.b32decode(code.upper() + "=" * (-len(code) % 8))
    except (binascii.Error, ValueError):
        raise TicketInvalid("This ticket is damaged: copy the whole of it again.") from None
    checksum, body = raw[:_CHECKSUM_BYTES], raw[_CHECKSUM_BYTES:]
    if checksum != _checksum(body):
        raise TicketInvalid(
            "This ticket has a wrong checksum: a letter is missing or wrong; copy it again."
        )
    return body


def redeem(invitation: Invitation | None, secret: bytes, node_id: str, now: float) -> Invitation:
    """Return the invitation after `node_id` has used it.  Raises TicketRefused.

    A newcomer that lost our answer may ask again: that is no second use.  The caller looks the
    invitation up by `secret_hash(secret)` and must write the use before it certifies anybody.
    """
    if invitation is None or invitation.secret_sha256 != secret_hash(secret):
        raise TicketRefused("This box knows no such ticket: it was withdrawn, or never issued.")
    if node_id in invitation.used_by:
        return invitation
    # A ticket for an hour, made while the clock was ahead, would be valid until then.
    if now * 1000 < invitation.made_at - _CLOCK_TOLERANCE_MS:
        raise TicketRefused(
            "By the inviter's clock this ticket is from the future: that clock is wrong, or was. "
            "Ask for a new one with pinaivu peers invite."
        )
    if now >= invitation.expires_at:
        raise TicketRefused("This ticket has expired: ask for a new one with pinaivu peers invite.")
    if len(invitation.used_by) >= invitation.uses:
        raise TicketRefused(
            "This ticket was used already: ask for a new one with pinaivu peers invite."
        )
    return invitation._replace(used_by=(*invitation.used_by, node_id))


def secret_hash(secret: bytes) -> str:
    """Return the hash by which the inviter finds its invitation; 128 random bits need no salt."""
    return hashlib.sha256(secret).hexdigest()


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM_BYTES]

"""What members sign and pass on: one record shape for all of it, and the two kinds of a roster.

A record is its kind, the exact bytes that were signed, and the signature.  Nobody serialises it
again: it is passed on as it came.  Each kind has a domain of its own, so that nothing signed as
one thing can be shown as another.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Annotated, Literal, TypeVar

from msgspec import DecodeError, Meta, Struct, msgpack

from pinaivu_box.identity import NODE_PREFIX, Identity, verify
from pinaivu_box.text import NAME, NO_CONTROLS

MAX_BODY_BYTES = 8192
NETWORK_PREFIX = "net_"

Kind = Literal["member", "revocation", "advert", "gone"]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
NetworkKey = Annotated[bytes, Meta(min_length=36, max_length=36)]
# What an operator calls a box: shown in lists, so no control characters and no line breaks.
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=NAME)]
MAX_COUNTER = 2**53 - 1
Counter = Annotated[int, Meta(ge=0, le=MAX_COUNTER)]
Content = TypeVar("Content", bound=Struct)


class Record(Struct, frozen=True, array_like=True):
    """`body` is msgpack of the kind's struct, `signature` Ed25519 over the kind's domain and it."""

    kind: Kind
    body: Annotated[bytes, Meta(max_length=MAX_BODY_BYTES)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class Certificate(Struct, frozen=True, array_like=True):
    """Makes `node` a member.  `issued_at` in Unix milliseconds; of several certificates of one box
    that of the highest `serial` names it."""

    network: NetworkKey
    node: Key
    inviter: Key
    name: Name
    issued_at: Counter
    serial: Counter
    admin: bool = False
    epoch: Counter = 0


class Revocation(Struct, frozen=True, array_like=True):
    """Voids the certificates of `node`: up to `epoch` if the founder signs, else of epoch 0."""

    network: NetworkKey
    node: Key
    signer: Key
    revoked_at: Counter
    reason: Annotated[str, Meta(max_length=200, pattern=NO_CONTROLS)] = ""
    epoch: Counter = 0


RosterContent = Certificate | Revocation


class Invalid(ValueError):
    """A record that no honest member passes on; says in a few words what is wrong with it."""


def key_of(node_id: str) -> bytes:
    """Return the 32 bytes of the public key of `node_…`.  Raises ValueError."""
    key = bytes.fromhex(node_id.removeprefix(NODE_PREFIX))
    if node_id != node_of(key) or len(key) != 32:
        raise ValueError(f"'{node_id[:80]}' is not a node id: it is node_ and 64 hex digits")
    return key


@lru_cache(16384)
def node_of(key: bytes) -> str:
    """Return the node id of a public key."""
    return NODE_PREFIX + key.hex()


def network_of(founder: str, nonce: bytes) -> str:
    """Return a network's id: `net_`, the founder's key and 4 random bytes, in hex.

    The founder is the root of all membership, so the id alone says whose certificates count.
    """
    return NETWORK_PREFIX + (key_of(founder) + nonce).hex()


def network_key(network: str) -> bytes:
    """Return the 36 bytes of `net_…`.  Raises ValueError."""
    key = bytes.fromhex(network.removeprefix(NETWORK_PREFIX))
    if network != NETWORK_PREFIX + key.hex() or len(key) != 36:
        raise ValueError(f"'{network[:80]}' is not a network id: it is net_ and 72 hex digits")
    return key


def domain(kind: Kind) -> str:
    """Return the domain that signatures over this kind are for."""
    return f"pinaivu/{kind}/v1"


def seal(identity: Identity, kind: Kind, content: Struct) -> Record:
    """Sign some content.  Raises ValueError if it is larger than others would take."""
    body = msgpack.encode(content)
    if len(body) > MAX_BODY_BYTES:
        raise ValueError(f"it has {len(body)} bytes, more than {MAX_BODY_BYTES}")
    return Record(kind, body, identity.sign(domain(kind), body))


def unseal(record: Record, content_type: type[Content], signer: str) -> Content:
    """Return the content, if the key in its field `signer` has signed it.  Raises Invalid."""
    if len(record.body) > MAX_BODY_BYTES:
        raise Invalid("too large")
    try:
        content = msgpack.decode(record.body, type=content_type)
    except (DecodeError, ValueError, RecursionError) as error:
        raise Invalid(f"no {record.kind}: {error}") from None
    node_id = node_of(getattr(content, signer))
    if not verify(node_id, domain(record.kind), record.body, record.signature):
        raise Invalid(f"a {record.kind} with a wrong signature")
    return content


def read(record: Record) -> RosterContent:
    """Return what a roster's record says, its form and signature checked.  Raises Invalid."""
    if record.kind == "member":
        return unseal(record, Certificate, "inviter")
    if record.kind == "revocation":
        return unseal(record, Revocation, "signer")
    raise Invalid(f"a {record.kind}, which is not a record of a roster")


def record_id(record: Record) -> bytes:
    """Return 16 bytes of SHA-256 over kind and body; the signature is not in it, since one body
    may have several."""
    return truncated_hash(record.kind.encode(), b"\n", record.body, size=16)


def signer_of(content: RosterContent) -> str:
    """Return the node id of who signed it."""
    return node_of(content.inviter if isinstance(content, Certificate) else content.signer)


def truncated_hash(*parts: bytes, size: int) -> bytes:
    """Return the first `size` bytes of the SHA-256 of the parts, one after the other."""
    return hashlib.sha256(b"".join(parts)).digest()[:size]

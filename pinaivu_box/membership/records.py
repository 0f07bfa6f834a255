"""What a roster is made of: certificates and revocations, as their signers made them."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from pinaivu_box.membership.signed import (
    Counter,
    Invalid,
    Key,
    NetworkKey,
    Record,
    hashed,
    node_of,
    unseal,
)
from pinaivu_box.membership.tickets import Name
from pinaivu_box.text import NO_CONTROLS


class Certificate(Struct, frozen=True, array_like=True):
    """`issued_at` in Unix milliseconds; of several for one box the highest `serial` names it."""

    network: NetworkKey
    node: Key
    inviter: Key
    name: Name
    issued_at: Counter
    serial: Counter
    admin: bool = False
    epoch: Counter = 0


class Revocation(Struct, frozen=True, array_like=True):
    """Voids what certified `node`, up to `epoch` if the founder signs, else epoch 0 only."""

    network: NetworkKey
    node: Key
    signer: Key
    revoked_at: Counter
    reason: Annotated[str, Meta(max_length=200, pattern=NO_CONTROLS)] = ""
    epoch: Counter = 0


Statement = Certificate | Revocation


def read(record: Record) -> Statement:
    """Checks form and signature.  Raises Invalid."""
    if record.kind == "member":
        return unseal(record, Certificate, "inviter")
    if record.kind == "revocation":
        return unseal(record, Revocation, "signer")
    raise Invalid(f"a {record.kind} is not the roster's")


def record_id(record: Record) -> bytes:
    """16 bytes of SHA-256; signatures are not in it, for one body may have several."""
    return hashed(record.kind.encode(), b"\n", record.body, size=16)


def signer_of(statement: Statement) -> str:
    by = statement.inviter if isinstance(statement, Certificate) else statement.signer
    return node_of(by)

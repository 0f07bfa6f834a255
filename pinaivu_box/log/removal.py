"""What a box signs when it deletes receipts: the entries whose receipts it no longer has.  So a
deletion by retention is told apart from one behind the box's back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
import rfc8785
from msgspec import Meta, Struct

from pinaivu_box import identity as identities
from pinaivu_box.identity import Identity
from pinaivu_box.log.note import NoteError

DOMAIN = "pinaivu/log-removal/v1"
_Index = Annotated[int, Meta(ge=0, lt=2**53)]
Range = tuple[_Index, _Index]  # the first and the last index


class Removal(Struct, frozen=True, forbid_unknown_fields=True):
    """`entries` of the log with this origin, as ranges in order."""

    origin: str
    entries: list[Range]
    v: Literal[1] = 1


def sign(identity: Identity, removal: Removal) -> tuple[bytes, bytes]:
    """The signed bytes (RFC 8785), and the signature."""
    signed = rfc8785.dumps(msgspec.to_builtins(removal))
    return signed, identity.sign(DOMAIN, signed)


def read(node_id: str, signed: bytes, signature: bytes) -> Removal:
    """The statement if that box has signed it.  Raises NoteError."""
    if not identities.verify(node_id, DOMAIN, signed, signature):
        raise NoteError(f"its signature is not that of {node_id}")
    try:
        return msgspec.json.decode(signed, type=Removal)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise NoteError(f"it is not a statement of a removal: {error}") from None


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same indices in as few ranges as possible, in order."""
    found: list[Range] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found

"""The frames of a settlement: each request has one response.

    Begin(last, head)        Begin         the latest statement and its hash
    Look(statement, upto)    LedgerDigest  from now on `AskRanges` is about the entries of that
                                           statement or, with 0, about those in none, up to a
                                           request id
    AskRanges(prefixes)      RangeHashes   see `reconcile`
    GiveEntries(keys)        Entries       the entries with these keys, as many as fit
    TakeEntries(entries)     EntriesTaken  those that are refused, and why
    ClaimEntries(claims)     Judged        what the sender served and the other has not accepted;
                                           its acceptances, or why there are none
    Unaccepted               ClaimEntries  the same of what the other served,
    Judged(accepted, ...)    EntriesTaken  and the acceptances of that
    Propose(signed, ...)     Agreed        the other's signature over the same bytes
    Done                                   the sender has what it lacked: now the other asks
    Begin                    SessionBusy   another session of the two is under way: send Begin again

The response to any of them may be `Reject`, with a sentence; it ends the session.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct, structs

from pinaivu_box.ledger.entry import MAX_PROOF_BYTES, LedgerEntry
from pinaivu_box.ledger.reconcile import Count, EntryKey, EntryRange, Name, entry_key
from pinaivu_box.store.times import now_ms

MAX_RANGES = 4  # in a frame: of 128 entries, each with three names of 128 characters
MAX_ENTRIES = 256  # in a frame
MAX_BATCH_BYTES = 600_000  # of entries in a frame, about
MAX_REASON_CHARACTERS = 500
_ENTRY_BYTES = 1000  # of an entry, beside its proof
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Sequence = Annotated[int, Meta(ge=0, lt=2**62)]
Reason = Annotated[str, Meta(max_length=MAX_REASON_CHARACTERS)]
_Signed = Annotated[bytes, Meta(max_length=MAX_PROOF_BYTES)]
_Number = Annotated[int, Meta(ge=0, lt=2**31)]
_Reasons = Annotated[dict[EntryKey, Reason], Meta(max_length=MAX_ENTRIES)]


class SignedEntry(Struct, frozen=True, array_like=True):
    """An entry as both boxes have it: `proof` under the `signature` of the `server` (a node id) and
    the coordinator's `acceptance`."""

    server: Name
    amount: Count
    proof: _Signed
    signature: Signature
    acceptance: Signature
    request_id: Name
    leg: _Number
    choice: _Number
    currency: Name

    @classmethod
    def of(cls, entry: LedgerEntry, us: str) -> SignedEntry:
        server = us if entry.served_by_us else entry.peer
        return cls(server, *(getattr(entry, name) for name in cls.__struct_fields__[1:]))

    @property
    def key(self) -> bytes:
        return entry_key(self.server, self.request_id, self.leg, self.choice)

    def entry(self, us: str, peer: str) -> LedgerEntry:
        """The entry as this box records it now."""
        fields = structs.asdict(self)
        return LedgerEntry(peer, fields.pop("server") == us, at=now_ms(), **fields)


class Claim(Struct, frozen=True, array_like=True):
    """An entry that its sender served and nobody has accepted."""

    amount: Count
    proof: _Signed
    signature: Signature
    request_id: Name
    leg: _Number
    choice: _Number
    currency: Name

    @classmethod
    def of(cls, entry: LedgerEntry) -> Claim:
        return cls(*(getattr(entry, name) for name in cls.__struct_fields__))

    def entry(self, server: str) -> LedgerEntry:
        """The entry as this box, which asked for the leg, records it now."""
        return LedgerEntry(server, False, at=now_ms(), **structs.asdict(self))


class Begin(Struct, frozen=True, tag="Begin"):
    """`head` is the SHA-256 of statement number `last`, b"" if there is none."""

    last: Sequence
    head: Annotated[bytes, Meta(max_length=32)]


class SessionBusy(Struct, frozen=True, tag="Wait"):
    pass


class Look(Struct, frozen=True, tag="Look"):
    statement: Sequence
    upto: Name = ""


class LedgerDigest(Struct, frozen=True, tag="Books"):
    """How many entries it has; of a statement also its bytes, the signature of the box that
    responds and that of the box that asked."""

    entries: Count
    signed: _Signed = b""
    ours: Annotated[bytes, Meta(max_length=64)] = b""
    yours: Annotated[bytes, Meta(max_length=64)] = b""


class AskRanges(Struct, frozen=True, tag="Ask"):
    prefixes: Annotated[
        list[Annotated[bytes, Meta(max_length=31)]], Meta(min_length=1, max_length=MAX_RANGES)
    ]


class RangeHashes(Struct, frozen=True, tag="Parts"):
    ranges: Annotated[list[EntryRange], Meta(max_length=MAX_RANGES)] = msgspec.field(name="parts")


class GiveEntries(Struct, frozen=True, tag="Give"):
    keys: Annotated[list[EntryKey], Meta(max_length=MAX_ENTRIES)] = msgspec.field(name="places")


class Entries(Struct, frozen=True, tag="Entries"):
    entries: Annotated[list[SignedEntry], Meta(max_length=MAX_ENTRIES)]


class TakeEntries(Struct, frozen=True, tag="Take"):
    entries: Annotated[list[SignedEntry], Meta(max_length=MAX_ENTRIES)]


class EntriesTaken(Struct, frozen=True, tag="Taken"):
    refused: _Reasons


class ClaimEntries(Struct, frozen=True, tag="Claims"):
    claims: Annotated[list[Claim], Meta(max_length=MAX_ENTRIES)]


class Unaccepted(Struct, frozen=True, tag="Unaccepted"):
    pass


class Judged(Struct, frozen=True, tag="Judged"):
    accepted: Annotated[dict[EntryKey, Signature], Meta(max_length=MAX_ENTRIES)]
    disputed: _Reasons


class Propose(Struct, frozen=True, tag="Propose"):
    signed: _Signed
    signature: Signature


class Agreed(Struct, frozen=True, tag="Agreed"):
    signature: Signature


class Done(Struct, frozen=True, tag="Done"):
    pass


class Reject(Struct, frozen=True, tag="Sorry"):
    message: Reason


Request = (
    Look | AskRanges | GiveEntries | TakeEntries | ClaimEntries | Unaccepted | Judged | Propose
)
Response = LedgerDigest | RangeHashes | Entries | EntriesTaken | ClaimEntries | Judged | Agreed
Frame = Begin | SessionBusy | Request | Response | Done | Reject
decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def fitting(entries: list[LedgerEntry]) -> list[LedgerEntry]:
    """The first of them that fit into a frame, at least one."""
    size = 0
    for count, entry in enumerate(entries):
        size += len(entry.proof) + _ENTRY_BYTES
        if count and size > MAX_BATCH_BYTES:
            return entries[:count]
    return entries

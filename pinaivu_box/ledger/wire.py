"""The frames of the ledger's conversation: each question has one answer.

    Begin(last, head)        Begin         which statement is the last, and its hash
    Look(statement, upto)    LedgerDigest  whose ranges `AskRanges` asks for: a statement's, or (0)
                                           what is in none, up to a request id
    AskRanges(prefixes)      RangeHashes   see `reconcile`
    GiveEntries(places)      Entries       as many of them as fit
    TakeEntries(entries)     EntriesTaken  those that are not taken, and why
    ClaimEntries(claims)     Judged        what the asker served and the other has not accepted: its
                                           acceptances, or why not
    Unaccepted               ClaimEntries  the same of the other's,
    Judged(accepted, ...)    EntriesTaken  and what the asker says to these
    Propose(signed, ...)     Agreed        the other's signature over the same bytes
    Done                                   the asker has what it lacked: now the other asks
    Begin                    Wait          another session of the two is under way: ask again

Any of them may be answered with `Reject`, a sentence, which ends the conversation.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.ledger.entry import MAX_PROOF_BYTES
from pinaivu_box.ledger.reconcile import Count, EntryRange, Name, Place

ASKED = 4  # parts in a frame: of 128 entries, each with three names of 128 characters
TOGETHER = 256  # entries in a frame, at most
BATCH_BYTES = 600_000
SENTENCE = 500  # characters
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Sequence = Annotated[int, Meta(ge=0, lt=2**62)]
_Signed = Annotated[bytes, Meta(max_length=MAX_PROOF_BYTES)]
_Places = Annotated[list[Place], Meta(max_length=TOGETHER)]


class WireEntry(Struct, frozen=True, array_like=True):
    """`proof` under `signature` of who served and `acceptance` of who had asked."""

    server: Name
    amount: Count
    proof: _Signed
    signature: Signature
    acceptance: Signature
    request_id: Name
    leg: Annotated[int, Meta(ge=0, lt=2**31)]
    choice: Annotated[int, Meta(ge=0, lt=2**31)]
    currency: Name


class Claim(Struct, frozen=True, array_like=True):
    """What who sends it has served; as `WireEntry`, and nobody has accepted it."""

    amount: Count
    proof: _Signed
    signature: Signature
    request_id: Name
    leg: Annotated[int, Meta(ge=0, lt=2**31)]
    choice: Annotated[int, Meta(ge=0, lt=2**31)]
    currency: Name


class Begin(Struct, frozen=True, tag="Begin"):
    last: Sequence
    head: Annotated[bytes, Meta(max_length=32)]


class Wait(Struct, frozen=True, tag="Wait"):
    pass


class Look(Struct, frozen=True, tag="Look"):
    statement: Sequence
    upto: Name = ""


class LedgerDigest(Struct, frozen=True, tag="Books"):
    """Of a statement: its bytes, the answerer's signature and the asker's."""

    entries: Count
    signed: _Signed = b""
    ours: Annotated[bytes, Meta(max_length=64)] = b""
    yours: Annotated[bytes, Meta(max_length=64)] = b""


class AskRanges(Struct, frozen=True, tag="Ask"):
    prefixes: Annotated[
        list[Annotated[bytes, Meta(max_length=31)]], Meta(min_length=1, max_length=ASKED)
    ]


class RangeHashes(Struct, frozen=True, tag="Parts"):
    parts: Annotated[list[EntryRange], Meta(max_length=ASKED)]


class GiveEntries(Struct, frozen=True, tag="Give"):
    places: _Places


class Entries(Struct, frozen=True, tag="Entries"):
    entries: Annotated[list[WireEntry], Meta(max_length=TOGETHER)]


class TakeEntries(Struct, frozen=True, tag="Take"):
    entries: Annotated[list[WireEntry], Meta(max_length=TOGETHER)]


class EntriesTaken(Struct, frozen=True, tag="Taken"):
    refused: Annotated[
        dict[Place, Annotated[str, Meta(max_length=SENTENCE)]], Meta(max_length=TOGETHER)
    ]


class ClaimEntries(Struct, frozen=True, tag="Claims"):
    claims: Annotated[list[Claim], Meta(max_length=TOGETHER)]


class Unaccepted(Struct, frozen=True, tag="Unaccepted"):
    pass


class Judged(Struct, frozen=True, tag="Judged"):
    accepted: Annotated[dict[Place, Signature], Meta(max_length=TOGETHER)]
    disputed: Annotated[
        dict[Place, Annotated[str, Meta(max_length=SENTENCE)]], Meta(max_length=TOGETHER)
    ]


class Propose(Struct, frozen=True, tag="Propose"):
    signed: _Signed
    signature: Signature


class Agreed(Struct, frozen=True, tag="Agreed"):
    signature: Signature


class Done(Struct, frozen=True, tag="Done"):
    pass


class Reject(Struct, frozen=True, tag="Sorry"):
    message: Annotated[str, Meta(max_length=SENTENCE)]


Frame = (
    Begin
    | Wait
    | Look
    | LedgerDigest
    | AskRanges
    | RangeHashes
    | GiveEntries
    | Entries
    | TakeEntries
    | EntriesTaken
    | ClaimEntries
    | Unaccepted
    | Judged
    | Propose
    | Agreed
    | Done
    | Reject
)
decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)

"""The frames of the gossip, about members, adverts and load: eight, all bounded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from msgspec import DecodeError, Meta, Struct, msgpack

from pinaivu_box.gossip.adverts import ModelLoad
from pinaivu_box.membership.records import Invalid, Key, Record
from pinaivu_box.membership.roster import BUCKETS

MAX_GIVE_BYTES = 200_000
MAX_AGE_MS = 2**31
MAX_IDS = 4096
MEMBER_ID, NEWS_ID = 16, 8  # bytes of an id: of a roster's record, of an advert or report
MAX_LOADS = 64

_Members = Annotated[bytes, Meta(max_length=MAX_IDS * MEMBER_ID)]
_News = Annotated[bytes, Meta(max_length=MAX_IDS * NEWS_ID)]


class HaveRecords(Struct, frozen=True, array_like=True, tag="have"):
    """The ids of records that the sender can give, one after the other."""

    members: _Members = b""
    news: _News = b""


class WantRecords(Struct, frozen=True, array_like=True, tag="want"):
    """The ids of records that the sender asks for."""

    members: _Members = b""
    news: _News = b""


class GivenRecord(Struct, frozen=True, array_like=True):
    """`age_ms`: how long ago it was first sent, as far as the sender knows."""

    record: Record
    age_ms: Annotated[int, Meta(ge=0, le=MAX_AGE_MS)] = 0


class GiveRecords(Struct, frozen=True, array_like=True, tag="give"):
    records: Annotated[tuple[GivenRecord, ...], Meta(max_length=MAX_IDS)]


class RosterDigest(Struct, frozen=True, array_like=True, tag="digest"):
    """`digest` of the sender's roster; a peer with another one answers with BucketHashes.  `news`
    depends on whose adverts it holds; a peer that holds those of others announces all it has.
    Boxes that send none do not know the frames about load."""

    digest: Annotated[bytes, Meta(min_length=16, max_length=16)]
    news: Annotated[bytes, Meta(max_length=16)] = b""


class BucketHashes(Struct, frozen=True, array_like=True, tag="parts"):
    """8 bytes for each bucket of the sender's roster.  The peer answers with a HaveRecords of those
    that differ, and, if this was not itself an `answer`, with its own hashes."""

    parts: Annotated[bytes, Meta(min_length=8 * BUCKETS, max_length=8 * BUCKETS)]
    answer: bool = False


_Model = Annotated[str, Meta(min_length=1, max_length=128)]


class LoadUpdate(Struct, frozen=True, array_like=True, tag="busy"):
    """The sender's own load, of the models where it has changed."""

    models: Annotated[tuple[tuple[_Model, ModelLoad], ...], Meta(max_length=MAX_LOADS)]


class LoadQuery(Struct, frozen=True, array_like=True, tag="who"):
    """Asks for the loads of the boxes that have this model and a link to the peer."""

    model: _Model


class LoadReport(Struct, frozen=True, array_like=True, tag="told"):
    """The answer to LoadQuery: keys of boxes, and their loads as they reported them."""

    model: _Model
    boxes: Annotated[tuple[tuple[Key, ModelLoad], ...], Meta(max_length=MAX_LOADS)]


Frame = (
    HaveRecords
    | WantRecords
    | GiveRecords
    | RosterDigest
    | BucketHashes
    | LoadUpdate
    | LoadQuery
    | LoadReport
)

_decoder: msgpack.Decoder[Frame] = msgpack.Decoder(Frame)
encode = msgpack.Encoder().encode


def decode(frame: bytes) -> Frame:
    """Read a frame.  Raises Invalid."""
    try:
        message: Frame = _decoder.decode(frame)
    except (DecodeError, ValueError, RecursionError) as error:
        raise Invalid(f"an invalid frame: {error}") from None
    if isinstance(message, HaveRecords | WantRecords) and (
        len(message.members) % MEMBER_ID or len(message.news) % NEWS_ID
    ):
        raise Invalid("a frame with half an id")
    return message


def ids(joined: bytes, size: int) -> list[bytes]:
    """Return the ids, of `size` bytes each, that stand one after the other."""
    return [joined[at : at + size] for at in range(0, len(joined), size)]


def batches(records: Iterable[GivenRecord]) -> list[GiveRecords]:
    """Return the records in as few frames as their size allows."""
    batches: list[list[GivenRecord]] = []
    size = 0
    for record in records:
        added = len(record.record.body) + 100
        if not batches or size + added > MAX_GIVE_BYTES or len(batches[-1]) == MAX_IDS:
            batches.append([])
            size = 0
        batches[-1].append(record)
        size += added
    return [GiveRecords(tuple(batch)) for batch in batches]

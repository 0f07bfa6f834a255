"""What boxes say to each other about members, adverts and load: eight frames, all bounded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from msgspec import DecodeError, Meta, Struct, msgpack

from pinaivu_box.membership.records import Invalid, Key, Record
from pinaivu_box.membership.roster import BUCKETS

MAX_GIVE_BYTES = 200_000
MAX_AGE_MS = 2**31
MAX_IDS = 4096
MEMBER_ID, NEWS_ID = 16, 8  # bytes of an id of the roster's and of an advert or report
MAX_TOLD = 64

_Members = Annotated[bytes, Meta(max_length=MAX_IDS * MEMBER_ID)]
_News = Annotated[bytes, Meta(max_length=MAX_IDS * NEWS_ID)]


class HaveRecords(Struct, frozen=True, array_like=True, tag="have"):
    """Ids, one behind the other, of what the sender can give."""

    members: _Members = b""
    news: _News = b""


class WantRecords(Struct, frozen=True, array_like=True, tag="want"):
    members: _Members = b""
    news: _News = b""


class GivenRecord(Struct, frozen=True, array_like=True):
    """`age_ms`: how long ago it was sent first, as far as the sender knows."""

    record: Record
    age_ms: Annotated[int, Meta(ge=0, le=MAX_AGE_MS)] = 0


class GiveRecords(Struct, frozen=True, array_like=True, tag="give"):
    records: Annotated[tuple[GivenRecord, ...], Meta(max_length=MAX_IDS)]


class RosterDigest(Struct, frozen=True, array_like=True, tag="digest"):
    """Of the sender's roster; who has another answers with Parts.  `news` is of whose adverts it
    holds; who holds others' announces all of its own.  Boxes that say none know no loads."""

    digest: Annotated[bytes, Meta(min_length=16, max_length=16)]
    news: Annotated[bytes, Meta(max_length=16)] = b""


class BucketHashes(Struct, frozen=True, array_like=True, tag="parts"):
    """8 bytes for each bucket of the sender's roster.  The other answers with a Have of those that
    differ, and if this was no `answer`, with its own Parts."""

    parts: Annotated[bytes, Meta(min_length=8 * BUCKETS, max_length=8 * BUCKETS)]
    answer: bool = False


_Count = Annotated[int, Meta(ge=0, le=2**31)]
_Model = Annotated[str, Meta(min_length=1, max_length=128)]


class ModelLoad(Struct, frozen=True, array_like=True):
    """What of an `advert.Offer` changes with every request."""

    sequences_free: _Count
    kv_free: _Count
    queue: _Count


class LoadUpdate(Struct, frozen=True, array_like=True, tag="busy"):
    """The sender's own load, of those models where it is another now."""

    models: Annotated[tuple[tuple[_Model, ModelLoad], ...], Meta(max_length=MAX_TOLD)]


class LoadQuery(Struct, frozen=True, array_like=True, tag="who"):
    """How busy are those that have this model and are linked with you?"""

    model: _Model


class LoadReport(Struct, frozen=True, array_like=True, tag="told"):
    """The answer to Who: keys of boxes, and their loads by their own word."""

    model: _Model
    boxes: Annotated[tuple[tuple[Key, ModelLoad], ...], Meta(max_length=MAX_TOLD)]


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
    """Raises Invalid."""
    try:
        found: Frame = _decoder.decode(frame)
    except (DecodeError, ValueError, RecursionError) as error:
        raise Invalid(f"a frame that is none: {error}") from None
    if isinstance(found, HaveRecords | WantRecords) and (
        len(found.members) % MEMBER_ID or len(found.news) % NEWS_ID
    ):
        raise Invalid("a frame with half an id")
    return found


def ids(joined: bytes, size: int) -> list[bytes]:
    return [joined[at : at + size] for at in range(0, len(joined), size)]


def batches(records: Iterable[GivenRecord]) -> list[GiveRecords]:
    """As few frames as their size allows."""
    made: list[GiveRecords] = []
    batch: list[GivenRecord] = []
    size = 0
    for given in records:
        more = len(given.record.body) + 100
        if batch and (size + more > MAX_GIVE_BYTES or len(batch) == MAX_IDS):
            made.append(GiveRecords(tuple(batch)))
            batch, size = [], 0
        batch.append(given)
        size += more
    return [*made, GiveRecords(tuple(batch))] if batch else made

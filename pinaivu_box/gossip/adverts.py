"""Adverts: what each box says of itself, how long that is valid, and which boxes are reported gone.

No clock of another box is trusted.  An advert is valid for `life` seconds from when it was sent,
which each box computes from its arrival and the age that the forwarding peer gives.  `at`, the
sender's clock, serves to show the difference to ours.  `serial` grows with every advert of a box;
the highest is remembered for as long as the box is a member, so an old one cannot be replayed.

How often a box sends adverts depends on the size of the network: every box receives about
`ADVERTS_PER_SECOND`.  Up to 125 boxes each sends one every 5 s, of 1,000 one every 40 s.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, Any, NamedTuple

from msgspec import Meta, Struct

from pinaivu_box import amount
from pinaivu_box.amount import Prices
from pinaivu_box.membership.records import (
    Counter,
    Invalid,
    Key,
    NetworkKey,
    Record,
    node_of,
    truncated_hash,
    unseal,
)
from pinaivu_box.membership.tickets import Address
from pinaivu_box.text import NO_CONTROLS

ADVERTS_PER_SECOND = 25
MIN_PERIOD_SECONDS = 5.0
PERIODS_PER_LIFE = 3
MAX_LIFE_SECONDS = 600
MAX_MODELS = 64
_MAX_PERIOD_SECONDS = MAX_LIFE_SECONDS / PERIODS_PER_LIFE
_ADVERT_BURST = 6.0  # of one member
_GONE_BURST = 24.0  # reports of one member
_GONE_PER_SECOND = 0.5

Small = Annotated[int, Meta(ge=0, le=2**31)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Price = Annotated[str, Meta(max_length=16)]


class ModelLoad(Struct, frozen=True, array_like=True):
    """What of an `Offer` changes with every request: `sequences_free` more would start at once,
    `kv_free` tokens of the cache are free, `queue` requests wait."""

    sequences_free: Small
    kv_free: Small
    queue: Small


class Offer(Struct, frozen=True, array_like=True):
    """One model.  At most `sequences` run at a time; for the rest of its load see `ModelLoad`.
    `ttft_ms` and `tokens_per_s` (of one stream) are medians of the latest requests.  Prices of
    1,000 tokens, decimal text: prompt, cached, completion."""

    id: Annotated[str, Meta(min_length=1, max_length=128, pattern=NO_CONTROLS)]
    digest: Digest
    sequences: Small
    sequences_free: Small
    kv_free: Small
    queue: Small
    ttft_ms: Small
    tokens_per_s: Small
    prices: tuple[Price, Price, Price]

    @property
    def price(self) -> Prices:
        prompt, cached, completion = self.prices
        return Prices(prompt, completion, cached)

    @property
    def load(self) -> ModelLoad:
        return ModelLoad(self.sequences_free, self.kv_free, self.queue)


class Facts(Struct, frozen=True):
    """What a box says of itself; see `Advert`."""

    version: str
    addresses: tuple[str, ...]
    currency: str
    models: tuple[Offer, ...]
    draining: bool = False
    cpu_variant: str = ""

    def gist(self) -> tuple[object, ...]:
        """Return what is worth an advert when it changes: all but small changes of load."""
        load = tuple(
            (
                offer.id,
                offer.digest,
                offer.prices,
                offer.sequences_free > 0,
                offer.queue.bit_length(),
            )
            for offer in self.models
        )
        return self.addresses, self.draining, self.cpu_variant, load


class Advert(Struct, frozen=True, array_like=True):
    """`at` in Unix milliseconds, `life` in seconds.  `cpu_variant` is that of ggml's library for
    the CPU, empty if no engine has run there yet."""

    network: NetworkKey
    node: Key
    serial: Counter
    at: Counter
    life: Annotated[int, Meta(ge=1, le=MAX_LIFE_SECONDS)]
    version: Annotated[str, Meta(max_length=32, pattern=NO_CONTROLS)]
    addresses: Annotated[tuple[Address, ...], Meta(max_length=8)]
    currency: Annotated[str, Meta(max_length=16, pattern=NO_CONTROLS)]
    models: Annotated[tuple[Offer, ...], Meta(max_length=MAX_MODELS)]
    draining: bool = False
    cpu_variant: Annotated[str, Meta(max_length=64, pattern=NO_CONTROLS)] = ""

    @property
    def node_id(self) -> str:
        return node_of(self.node)


class GoneReport(Struct, frozen=True, array_like=True):
    """`reporter` lost its link to `node`, whose last advert it knows is `serial`.

    A hint, like a suspicion in SWIM: a box that is reported gone is asked last until its next
    advert, which it sends as soon as it receives the report.  So a false report costs seconds.
    """

    network: NetworkKey
    node: Key
    serial: Counter
    reporter: Key


def read(record: Record) -> Advert | GoneReport:
    """Return what a record says, its form, prices and signature checked.  Raises Invalid."""
    if record.kind == "gone":
        return unseal(record, GoneReport, "reporter")
    if record.kind != "advert":
        raise Invalid(f"a {record.kind}, which is not an advert")
    advert = unseal(record, Advert, "node")
    try:
        for offer in advert.models:
            amount.prices(offer.price)
    except ValueError as error:
        raise Invalid(f"an advert whose price is {error}") from None
    return advert


def record_id(record: Record, content: Advert | GoneReport) -> bytes:
    """Return 8 bytes; all reports that a box is gone have the same id."""
    if isinstance(content, GoneReport):
        return truncated_hash(b"gone\n", content.node, content.serial.to_bytes(8, "big"), size=8)
    return truncated_hash(b"advert\n", record.body, size=8)


def signer_of(content: Advert | GoneReport) -> str:
    """Return the node id of who signed it."""
    return node_of(content.reporter if isinstance(content, GoneReport) else content.node)


def period(members: int) -> float:
    """Return the seconds between two adverts of a box in a network of so many members."""
    return min(max(MIN_PERIOD_SECONDS, members / ADVERTS_PER_SECOND), _MAX_PERIOD_SECONDS)


def min_gap(members: int) -> float:
    """Return the fewest seconds between two adverts of a box, however much changes."""
    return min(max(1.0, members / ADVERTS_PER_SECOND), _MAX_PERIOD_SECONDS)


class TokenBucket:
    """A rate limit: `burst` tokens at most, filled at a `rate`."""

    __slots__ = ("_burst", "_tokens", "_updated_at")

    def __init__(self, burst: float) -> None:
        self._burst = self._tokens = burst
        self._updated_at: float | None = None

    def take(self, rate: float, now: float, amount: float = 1.0) -> bool:
        """Take so many tokens at `now` (monotonic), after the bucket was filled at `rate` a second;
        returns False if there are fewer."""
        if self._updated_at is not None:
            elapsed = now - self._updated_at
            self._tokens = min(self._burst, self._tokens + rate * elapsed)
        self._updated_at = now
        if self._tokens < amount:
            return False
        self._tokens -= amount
        return True


class HeldAdvert(NamedTuple):
    """`sent_at` and `expires_at` on our monotonic clock, in seconds."""

    advert: Advert
    record: Record
    id: bytes
    sent_at: float
    expires_at: float


class Adverts:
    """The newest advert of each member, and the reports that members are gone.

    The caller has checked that what comes here is from a member.
    """

    def __init__(self) -> None:
        self._newest: dict[str, HeldAdvert] = {}  # of each member, also when it has expired
        self._adverts: dict[str, HeldAdvert] = {}  # those of them that are announced
        self._senders_xor = 0  # the beginnings of their keys, combined
        self._gone: dict[str, bytes] = {}  # ids of the reports
        self._records: dict[bytes, tuple[Record, float]] = {}
        self._advert_limits: dict[str, TokenBucket] = {}
        self._report_limits: dict[str, TokenBucket] = {}

    def accept(
        self, advert: Advert, record: Record, age: float, now: float, members: int
    ) -> str | None:
        """Keep an advert that was `age` seconds old when it came; returns why not, or None if it is
        kept."""
        node = advert.node_id
        newest = self._newest.get(node)
        if newest is not None and advert.serial <= newest.advert.serial:
            return "older than the newest one"
        if age >= advert.life:
            return "expired"
        bucket = self._advert_limits.setdefault(node, TokenBucket(_ADVERT_BURST))
        if not bucket.take(2 / min_gap(members), now):
            return "more adverts than a member may send"
        self._drop(node)
        sent_at = now - age
        held = HeldAdvert(advert, record, record_id(record, advert), sent_at, sent_at + advert.life)
        self._newest[node] = self._adverts[node] = held
        self._senders_xor ^= int.from_bytes(advert.node[:16])
        self._records[held.id] = (record, sent_at)
        return None

    def report(self, gone: GoneReport, record: Record, now: float) -> str | None:
        """Keep a report that a box is gone; returns why not, or None if it is kept."""
        node = node_of(gone.node)
        entry = self._adverts.get(node)
        if entry is None or entry.advert.serial != gone.serial:
            return "not about its last advert"
        if node in self._gone:
            return "known"
        bucket = self._report_limits.setdefault(node_of(gone.reporter), TokenBucket(_GONE_BURST))
        if not bucket.take(_GONE_PER_SECOND, now):
            return "more reports than a member may send"
        self._gone[node] = key = record_id(record, gone)
        self._records[key] = (record, now)
        return None

    def get(self, node_id: str) -> HeldAdvert | None:
        """Return the newest advert of a box, which may have expired; None if there is none."""
        return self._adverts.get(node_id)

    def newer(self, advert: Advert) -> HeldAdvert | None:
        """Return a newer advert of the same box, which may have expired; None if there is none."""
        newest = self._newest.get(advert.node_id)
        return newest if newest is not None and advert.serial < newest.advert.serial else None

    def gone(self, node_id: str) -> bool:
        """Whether the box was reported gone since its last advert."""
        return node_id in self._gone

    def ids(self) -> list[bytes]:
        """Return the ids of all adverts and reports."""
        return list(self._records)

    def digest(self) -> bytes:
        """Return 16 bytes that depend on which boxes there are adverts of."""
        return self._senders_xor.to_bytes(16)

    def find(self, key: bytes) -> tuple[Record, float] | None:
        """Return the advert or report of that id and when it was sent, on our clock."""
        return self._records.get(key)

    def forget(self, now: float, members: Container[str]) -> list[bytes]:
        """Drop what has expired and what is not of members; returns the ids of what was dropped."""
        kinds: tuple[dict[str, Any], ...] = self._newest, self._advert_limits, self._report_limits
        for by_node in kinds:
            for node in [node for node in by_node if node not in members]:
                del by_node[node]
        expired = [
            node
            for node, entry in self._adverts.items()
            if entry.expires_at <= now or node not in members
        ]
        return [key for node in expired for key in self._drop(node)]

    def _drop(self, node: str) -> list[bytes]:
        """Drop the advert of a box and any report that it is gone; returns their ids."""
        entry, gone = self._adverts.pop(node, None), self._gone.pop(node, None)
        dropped = [entry.id] if entry else []
        if entry:
            self._senders_xor ^= int.from_bytes(entry.advert.node[:16])
        if gone:
            dropped.append(gone)
        for key in dropped:
            del self._records[key]
        return dropped

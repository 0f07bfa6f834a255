"""Adverts: what each box says of itself, how long that counts, and who is believed to be gone.

No clock of another box is trusted.  An advert lives for `life` seconds from when it was sent,
which everybody reckons from when it came and from the age that whoever passed it on says it had.
`at`, the sender's clock, serves to show the difference to ours.  `serial` grows with every advert
of a box; the highest seen is remembered for as long as the box is a member, so an old one cannot
be played again.

How often a box speaks depends on how many there are: every box hears about `ADVERTS_PER_SECOND`,
however large the network.  Up to 125 boxes that is every 5 s; of 1,000 each speaks every 40 s.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
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
    hashed,
    node_of,
    unseal,
)
from pinaivu_box.membership.tickets import Address
from pinaivu_box.text import NO_CONTROLS

ADVERTS_PER_SECOND = 25
SHORTEST_PERIOD = 5.0  # seconds
LIVES = 3  # periods that an advert lives
MAX_LIFE = 600
MAX_MODELS = 64
_BURST = 6.0  # adverts of one member at once
_GONE_BURST = 24.0  # members whom one member may call gone at once
_GONE_PER_SECOND = 0.5

Small = Annotated[int, Meta(ge=0, le=2**31)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Price = Annotated[str, Meta(max_length=16)]


class Offer(Struct, frozen=True, array_like=True):
    """One model.  `sequences` run at most at a time, `sequences_free` more would start at once,
    `queue` wait; `kv_free` tokens of cache.  `ttft_ms` and `tokens_per_s` (of one stream) are the
    medians measured lately.  Prices of 1,000 tokens, decimal text: prompt, cached, completion."""

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


class Facts(Struct, frozen=True):
    """What a box says of itself; see `Advert`."""

    version: str
    addresses: tuple[str, ...]
    currency: str
    models: tuple[Offer, ...]
    draining: bool = False

    def gist(self) -> tuple[object, ...]:
        """What is worth an advert when it changes: all but small moves of load."""
        load = tuple(
            (o.id, o.digest, o.prices, o.sequences_free > 0, o.queue.bit_length())
            for o in self.models
        )
        return self.addresses, self.draining, load


class Advert(Struct, frozen=True, array_like=True):
    """`at` in Unix milliseconds, `life` in seconds."""

    network: NetworkKey
    node: Key
    serial: Counter
    at: Counter
    life: Annotated[int, Meta(ge=1, le=MAX_LIFE)]
    version: Annotated[str, Meta(max_length=32, pattern=NO_CONTROLS)]
    addresses: Annotated[tuple[Address, ...], Meta(max_length=8)]
    currency: Annotated[str, Meta(max_length=16, pattern=NO_CONTROLS)]
    models: Annotated[tuple[Offer, ...], Meta(max_length=MAX_MODELS)]
    draining: bool = False

    @property
    def node_id(self) -> str:
        return node_of(self.node)


class GoneReport(Struct, frozen=True, array_like=True):
    """`reporter` lost its link to `node`, whose last advert it knows is `serial`.

    A hint: whoever is called gone is asked last, until an advert of a higher serial says otherwise,
    and it sends one as soon as it hears of it.  So a lie costs its victim seconds.
    """

    network: NetworkKey
    node: Key
    serial: Counter
    reporter: Key


def read(record: Record) -> Advert | GoneReport:
    """Checks form, prices and signature.  Raises Invalid."""
    if record.kind == "gone":
        return unseal(record, GoneReport, "reporter")
    if record.kind != "advert":
        raise Invalid(f"a {record.kind} is no advert")
    advert = unseal(record, Advert, "node")
    try:
        for offer in advert.models:
            amount.prices(offer.price)
    except ValueError as error:
        raise Invalid(f"an advert whose price is {error}") from None
    return advert


def record_id(record: Record, content: Advert | GoneReport) -> bytes:
    """8 bytes.  One report that somebody is gone is as good as another's."""
    if isinstance(content, GoneReport):
        return gone_id(content.node, content.serial)
    return hashed(b"advert\n", record.body, size=8)


def signer_of(content: Advert | GoneReport) -> str:
    return node_of(content.reporter if isinstance(content, GoneReport) else content.node)


def gone_id(node: bytes, serial: int) -> bytes:
    return hashed(b"gone\n", node, serial.to_bytes(8, "big"), size=8)


def period(members: int) -> float:
    """Seconds between two adverts of a box in a network of so many."""
    return min(max(SHORTEST_PERIOD, members / ADVERTS_PER_SECOND), MAX_LIFE / LIVES)


def gap(members: int) -> float:
    """Seconds that a box should leave between adverts even if much changes."""
    return min(max(1.0, members / ADVERTS_PER_SECOND), MAX_LIFE / LIVES)


class TokenBucket:
    """A bucket of `burst` that fills by `rate` a second."""

    __slots__ = ("_at", "_burst", "_left")

    def __init__(self, burst: float) -> None:
        self._burst = self._left = burst
        self._at: float | None = None

    def take(self, rate: float, now: float, amount: float = 1.0) -> bool:
        if self._at is not None:
            self._left = min(self._burst, self._left + rate * (now - self._at))
        self._at = now
        if self._left < amount:
            return False
        self._left -= amount
        return True


class HeldAdvert(NamedTuple):
    """`sent_at` and `until` on our own monotonic clock, seconds.  `clock_difference_ms`: theirs
    minus ours, more or less; it is shown, and decides nothing."""

    advert: Advert
    id: bytes
    sent_at: float
    until: float
    clock_difference_ms: int


class Adverts:
    """The newest advert of each member, and the reports that some are gone.

    The caller asks the roster first; what comes here is by a member.
    """

    def __init__(self) -> None:
        self._held: dict[str, HeldAdvert] = {}
        self._whose = 0  # all their keys, one upon the other
        self._serials: dict[str, int] = {}
        self._newest: dict[str, tuple[Record, float]] = {}
        self._gone: dict[str, bytes] = {}  # ids of the reports
        self._ids: dict[bytes, tuple[Record, float]] = {}
        self._allowed: dict[str, TokenBucket] = {}
        self._reports: dict[str, TokenBucket] = {}

    def accept(
        self, advert: Advert, record: Record, age: float, now: float, wall_ms: int, members: int
    ) -> str | None:
        """Why it does not count, or None.  `age` in seconds is how old it was when it came."""
        node = advert.node_id
        if advert.serial <= self._serials.get(node, -1):
            return "older than one that is known"
        if age >= advert.life:
            return "expired"
        bucket = self._allowed.setdefault(node, TokenBucket(_BURST))
        if not bucket.take(2 / gap(members), now):
            return "more adverts than a member may send"
        sent = now - age
        difference = advert.at - (wall_ms - round(age * 1000))
        self._drop(node)
        number = record_id(record, advert)
        self._serials[node] = advert.serial
        self._newest[node] = (record, sent)
        self._held[node] = HeldAdvert(advert, number, sent, sent + advert.life, difference)
        self._whose ^= int.from_bytes(advert.node[:16])
        self._ids[number] = (record, sent)
        return None

    def report(self, gone: GoneReport, record: Record, now: float) -> str | None:
        """Why the report does not count, or None."""
        node = node_of(gone.node)
        held = self._held.get(node)
        if held is None or held.advert.serial != gone.serial:
            return "not about its last advert"
        if node in self._gone:
            return "known"
        bucket = self._reports.setdefault(node_of(gone.reporter), TokenBucket(_GONE_BURST))
        if not bucket.take(_GONE_PER_SECOND, now):
            return "more reports than a member may send"
        self._gone[node] = number = record_id(record, gone)
        self._ids[number] = (record, now)
        return None

    def fresh(self, now: float) -> Iterator[HeldAdvert]:
        return (held for held in self._held.values() if held.until > now)

    def get(self, node_id: str) -> HeldAdvert | None:
        """The newest, perhaps expired."""
        return self._held.get(node_id)

    def newer(self, advert: Advert) -> tuple[Record, float] | None:
        """A newer one of the same box, though it may have expired, and when that was sent, on our
        clock."""
        if advert.serial >= self._serials.get(advert.node_id, -1):
            return None
        return self._newest[advert.node_id]

    def gone(self, node_id: str) -> bool:
        return node_id in self._gone

    def ids(self) -> list[bytes]:
        """Of all adverts and reports."""
        return list(self._ids)

    def digest(self) -> bytes:
        """16 bytes: of whom there are adverts."""
        return self._whose.to_bytes(16)

    def find(self, number: bytes) -> tuple[Record, float] | None:
        """The advert or report of that id and when it was sent, on our clock."""
        return self._ids.get(number)

    def forget(self, now: float, members: Container[str]) -> list[bytes]:
        """Drop what expired and who is no member; returns the ids of what went."""
        kinds: tuple[dict[str, Any], ...] = (
            self._serials, self._newest, self._allowed, self._reports
        )  # fmt: skip
        for kept in kinds:
            for node in [node for node in kept if node not in members]:
                del kept[node]
        ended = [
            node for node, held in self._held.items() if held.until <= now or node not in members
        ]
        return [number for node in ended for number in self._drop(node)]

    def _drop(self, node: str) -> list[bytes]:
        """The advert of a box, and with it any report that it is gone."""
        held, gone = self._held.pop(node, None), self._gone.pop(node, None)
        dropped = [held.id] if held else []
        if held:
            self._whose ^= int.from_bytes(held.advert.node[:16])
        if gone:
            dropped.append(gone)
        for number in dropped:
            del self._ids[number]
        return dropped

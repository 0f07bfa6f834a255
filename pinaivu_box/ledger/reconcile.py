"""What two boxes have done for each other, compared and added up.  Pure.

Each side has its `EntryTree`: entries at places that both sides know, since a place is the hash of
who served which leg of which request.  A range of the tree is all whose places begin the same, and
its hash is over the hashes of its entries in the order of their places.  Where the hashes of a
range differ, its 256 parts are compared, down to a few entries: so one entry that differs among n
is found in log n questions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from decimal import Decimal
from hashlib import sha256
from typing import Annotated, Any

import msgspec
import rfc8785
from msgspec import Meta, Struct

from pinaivu_box import amount
from pinaivu_box.errors import ProtocolError
from pinaivu_box.receipts.receipt import canonical
from pinaivu_box.text import TIME, whole

DOMAIN = "pinaivu/statement/v1"
VERSION = 1
FEW = 128  # entries of a part that are given one by one
MOST = 100_000  # entries that one side lacks, and questions that are open
PLACE = 32  # bytes
Place = Annotated[bytes, Meta(min_length=PLACE, max_length=PLACE)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Name = Annotated[str, Meta(max_length=128)]


def place(server: str, request_id: str, leg: int, choice: int) -> bytes:
    """Where both sides have the same entry."""
    return sha256(msgspec.msgpack.encode((server, request_id, leg, choice))).digest()


class Item(Struct, frozen=True, array_like=True):
    """An entry in short, the same at both boxes; `amount` in 10^-9 of the currency."""

    server: Name  # the node_id of who served it
    request_id: Name
    leg: Annotated[int, Meta(ge=0, lt=2**31)]
    choice: Annotated[int, Meta(ge=0, lt=2**31)]
    currency: Name
    amount: Count
    proof_sha256: Place

    @property
    def place(self) -> bytes:
        return place(self.server, self.request_id, self.leg, self.choice)

    @property
    def worth(self) -> str:
        return f"{amount.to_text(self.amount)} {self.currency}"


class EntryRange(Struct, frozen=True, array_like=True):
    """Its entries if they are few; otherwise 16 bytes of the hash of each of its 256 parts."""

    items: Annotated[list[Item], Meta(max_length=FEW)]
    hashes: Annotated[bytes, Meta(max_length=256 * 16)] = b""


class Statement(Struct, frozen=True):
    """What both sign, as RFC 8785 JSON: that these and no other entries lie between them since the
    statement before (`previous`: the SHA-256 of its bytes, hex).  `served`: by whom how much of
    each currency, decimal text.  `at` is the proposer's clock."""

    sequence: int
    previous: str
    between: list[str]  # both node_ids, sorted
    upto: Annotated[
        str, Meta(pattern=whole("[!-~]{0,128}"))
    ]  # the last request id that it looks at; "" for all
    entries: int
    entries_sha256: str
    served: dict[str, dict[str, str]]
    at: Annotated[str, Meta(pattern=TIME)]
    v: int = VERSION


class EntryTree:
    def __init__(self, items: Iterable[Item] = ()) -> None:
        self.items: dict[bytes, Item] = {}
        self._hashes: dict[bytes, bytes] = {}
        self._sorted: list[bytes] | None = None
        for item in items:
            self.add(item)

    def add(self, item: Item) -> None:
        place = item.place
        self.items[place] = item
        self._hashes[place] = sha256(msgspec.msgpack.encode(item)).digest()
        self._sorted = None

    def part(self, prefix: bytes) -> EntryRange:
        places = self._places(prefix)
        if len(places) <= FEW or len(prefix) == PLACE - 1:
            return EntryRange([self.items[place] for place in places])
        return EntryRange([], b"".join(self.hash(prefix + bytes([n]))[:16] for n in range(256)))

    def hash(self, prefix: bytes = b"") -> bytes:
        return sha256(b"".join(self._hashes[place] for place in self._places(prefix))).digest()

    def within(self, prefix: bytes) -> dict[bytes, Item]:
        return {place: self.items[place] for place in self._places(prefix)}

    def _places(self, prefix: bytes) -> list[bytes]:
        if self._sorted is None:
            self._sorted = sorted(self.items)
        start = bisect_left(self._sorted, prefix)
        return self._sorted[start : bisect_left(self._sorted, prefix + b"\xff" * PLACE, start)]

    def served(self, between: Iterable[str]) -> dict[str, dict[str, str]]:
        sums: dict[str, dict[str, int]] = {node: {} for node in between}
        for item in self.items.values():
            mine = sums[item.server]
            mine[item.currency] = mine.get(item.currency, 0) + item.amount
        return {
            node: {currency: amount.to_text(total) for currency, total in mine.items()}
            for node, mine in sums.items()
        }


class Compare:
    """Where a peer's books differ from ours: `questions` are prefixes of parts to ask it for."""

    def __init__(self, ours: EntryTree) -> None:
        self.only_ours: dict[bytes, Item] = {}
        self.only_theirs: dict[bytes, Item] = {}
        self.different: dict[bytes, tuple[Item, Item]] = {}
        self._ours = ours
        self._open = [b""]

    def questions(self, most: int) -> list[bytes]:
        asked, self._open = self._open[:most], self._open[most:]
        return asked

    def take(self, prefix: bytes, part: EntryRange) -> None:
        """The answer to one.  Raises ProtocolError."""
        if part.hashes:
            if len(part.hashes) != 256 * 16 or part.items or len(prefix) >= PLACE - 1:
                raise ProtocolError("a part of the ledger is neither entries nor hashes")
            for number in range(256):
                below = prefix + bytes([number])
                if self._ours.hash(below)[:16] != part.hashes[16 * number : 16 * number + 16]:
                    self._open.append(below)
            if len(self._open) > MOST:
                raise ProtocolError("the peer's ledger has no end")
            return
        theirs = {item.place: item for item in part.items}
        if not all(place.startswith(prefix) for place in theirs):
            raise ProtocolError("a part of the ledger has entries of another part")
        ours = self._ours.within(prefix)
        self.only_ours |= {place: ours[place] for place in ours.keys() - theirs.keys()}
        self.only_theirs |= {place: theirs[place] for place in theirs.keys() - ours.keys()}
        both = ours.keys() & theirs.keys()
        if len(self.only_theirs) > MOST:
            raise ProtocolError(f"the peer's ledger has over {MOST} entries that are not here")
        changed = (place for place in both if ours[place] != theirs[place])
        self.different |= {place: (ours[place], theirs[place]) for place in changed}


def compose(
    books: EntryTree, between: Iterable[str], sequence: int, previous: bytes, upto: str, at: str
) -> Statement:
    """`previous`: the signed bytes of the one before, b"" if there is none."""
    names = sorted(between)
    return Statement(
        sequence=sequence,
        previous=sha256(previous).hexdigest() if previous else "",
        between=names,
        upto=upto,
        entries=len(books.items),
        entries_sha256=books.hash().hex(),
        served=books.served(names),
        at=at,
    )


def read(signed: bytes) -> Statement:
    """Raises ProtocolError, also if the bytes are not the ones that these words are signed as."""
    try:
        statement = msgspec.json.decode(signed, type=Statement)
        if statement.v != VERSION or canonical(statement) != signed:
            raise ValueError(f"it is not of version {VERSION}, or not canonical")
    except (ValueError, RecursionError, rfc8785.CanonicalizationError) as error:
        raise ProtocolError(f"what should be a statement is none: {error}") from error
    return statement


def statement_id(signed: bytes) -> str:
    return "stmt_" + sha256(signed).hexdigest()[:24]


def net(served: dict[str, dict[str, Any]], us: str) -> Iterator[tuple[str, Decimal]]:
    """Of each currency, what the other owes us for what a statement says; below 0 what we owe."""
    (other,) = served.keys() - {us}
    for currency in sorted(served[us].keys() | served[other].keys()):
        mine, its = (Decimal(served[node].get(currency, "0")) for node in (us, other))
        yield currency, mine - its

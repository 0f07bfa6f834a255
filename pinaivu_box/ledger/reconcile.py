"""Compares the entries of two boxes and finds where they differ.  Pure.

Each entry has a key that both boxes know, the hash of which box served which leg of which request.
A range is all entries whose keys have the same prefix, and its hash covers the hashes of its
entries in the order of their keys.  Where the hashes of a range differ, its 256 subranges are
compared, down to a few entries: one entry that differs among n is found in log n requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from pinaivu_box import amount
from pinaivu_box.errors import ProtocolError

KEY_BYTES = 32
MAX_LISTED_ENTRIES = 128  # of a range that is given entry by entry
MAX_MISSING_ENTRIES = 100_000  # that one side lacks, and ranges that are still to be compared
_HASH_BYTES = 16  # of a subrange's hash, as it is sent
EntryKey = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Name = Annotated[str, Meta(max_length=128)]


def entry_key(server: str, request_id: str, leg: int, choice: int) -> bytes:
    """The key of an entry, the same on both boxes."""
    return sha256(msgspec.msgpack.encode((server, request_id, leg, choice))).digest()


class EntrySummary(Struct, frozen=True, array_like=True):
    """What is compared of an entry; `server` is the node id of the box that served the leg,
    `amount` in 10^-9 of the currency."""

    server: Name
    request_id: Name
    leg: Annotated[int, Meta(ge=0, lt=2**31)]
    choice: Annotated[int, Meta(ge=0, lt=2**31)]
    currency: Name
    amount: Count
    proof_sha256: EntryKey

    @property
    def key(self) -> bytes:
        return entry_key(self.server, self.request_id, self.leg, self.choice)

    @property
    def price(self) -> str:
        return f"{amount.to_text(self.amount)} {self.currency}"


class EntryRange(Struct, frozen=True, array_like=True):
    """The entries of a range if they are few, otherwise 16 bytes of the hash of each subrange."""

    entries: Annotated[list[EntrySummary], Meta(max_length=MAX_LISTED_ENTRIES)]
    hashes: Annotated[bytes, Meta(max_length=256 * _HASH_BYTES)] = b""


class EntryTree:
    """Entries by their keys, with the hashes of ranges."""

    def __init__(self, entries: Iterable[EntrySummary] = ()) -> None:
        self.entries: dict[bytes, EntrySummary] = {}
        self._hashes: dict[bytes, bytes] = {}
        self._sorted: list[bytes] | None = None
        for entry in entries:
            self.add(entry)

    def add(self, entry: EntrySummary) -> None:
        key = entry.key
        self.entries[key] = entry
        self._hashes[key] = sha256(msgspec.msgpack.encode(entry)).digest()
        self._sorted = None

    def remove(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self.entries.pop(key, None)
        self._sorted = None

    def range(self, prefix: bytes) -> EntryRange:
        """The range of the keys with that prefix, as a peer gets it."""
        keys = self._keys(prefix)
        if len(keys) <= MAX_LISTED_ENTRIES or len(prefix) == KEY_BYTES - 1:
            return EntryRange([self.entries[key] for key in keys])
        hashes = (self.hash(prefix + bytes([n]))[:_HASH_BYTES] for n in range(256))
        return EntryRange([], b"".join(hashes))

    def hash(self, prefix: bytes = b"") -> bytes:
        return sha256(b"".join(self._hashes[key] for key in self._keys(prefix))).digest()

    def within(self, prefix: bytes) -> dict[bytes, EntrySummary]:
        return {key: self.entries[key] for key in self._keys(prefix)}

    def _keys(self, prefix: bytes) -> list[bytes]:
        if self._sorted is None:
            self._sorted = sorted(self.entries)
        start = bisect_left(self._sorted, prefix)
        return self._sorted[start : bisect_left(self._sorted, prefix + b"\xff" * KEY_BYTES, start)]

    def served(self, between: Iterable[str]) -> dict[str, dict[str, str]]:
        """What each of the two boxes served, by node id and currency, as decimal text."""
        sums: dict[str, Counter[str]] = {node: Counter() for node in between}
        for entry in self.entries.values():
            sums[entry.server][entry.currency] += entry.amount
        return {
            node: {currency: amount.to_text(total) for currency, total in served.items()}
            for node, served in sums.items()
        }


class Comparison:
    """Finds where a peer's entries differ from ours, as the peer's ranges come in."""

    def __init__(self, ours: EntryTree) -> None:
        self.only_ours: dict[bytes, EntrySummary] = {}
        self.only_theirs: dict[bytes, EntrySummary] = {}
        self.different: dict[bytes, tuple[EntrySummary, EntrySummary]] = {}
        self._ours = ours
        self._open = [b""]

    def next_prefixes(self, limit: int) -> list[bytes]:
        """The prefixes of ranges to ask the peer for next; none once the comparison is complete."""
        prefixes, self._open = self._open[:limit], self._open[limit:]
        return prefixes

    def compare(self, prefix: bytes, theirs: EntryRange) -> None:
        """Compare the peer's range of that prefix.  Raises ProtocolError."""
        if theirs.hashes:
            self._compare_hashes(prefix, theirs)
            return
        their_entries = {entry.key: entry for entry in theirs.entries}
        if not all(key.startswith(prefix) for key in their_entries):
            raise ProtocolError("a range of the ledger has entries of another range")
        ours = self._ours.within(prefix)
        self.only_ours |= {key: ours[key] for key in ours.keys() - their_entries.keys()}
        self.only_theirs |= {key: their_entries[key] for key in their_entries.keys() - ours.keys()}
        if len(self.only_theirs) > MAX_MISSING_ENTRIES:
            raise ProtocolError(
                f"the peer's ledger has over {MAX_MISSING_ENTRIES} entries that are not here"
            )
        changed = (
            key for key in ours.keys() & their_entries.keys() if ours[key] != their_entries[key]
        )
        self.different |= {key: (ours[key], their_entries[key]) for key in changed}

    def _compare_hashes(self, prefix: bytes, theirs: EntryRange) -> None:
        if (
            len(theirs.hashes) != 256 * _HASH_BYTES
            or theirs.entries
            or len(prefix) >= KEY_BYTES - 1
        ):
            raise ProtocolError("a range of the ledger is neither entries nor hashes")
        for number in range(256):
            below, start = prefix + bytes([number]), _HASH_BYTES * number
            if self._ours.hash(below)[:_HASH_BYTES] != theirs.hashes[start : start + _HASH_BYTES]:
                self._open.append(below)
        if len(self._open) > MAX_MISSING_ENTRIES:
            raise ProtocolError("the comparison of the ledgers has no end")

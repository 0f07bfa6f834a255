"""Was the database edited behind the box's back?  All that it has signed must still be there.

Reads through one connection, and changes nothing.  A deletion by the box itself has left a signed
record (`log/removal.py`), so that any other is found.  Who has the key of the box can sign whatever
he likes: against him, only what others have kept counts (witnesses, owners of receipts).
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from msgspec import Struct

from pinaivu_box import identity as identities
from pinaivu_box.log import checkpoint, merkle, note, removal, restart, tiles
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.entry_proof import entry_of
from pinaivu_box.log.merkle import HASH_BYTES
from pinaivu_box.log.note import NoteError
from pinaivu_box.log.removal import Range
from pinaivu_box.log.restart import SignedRestart
from pinaivu_box.receipts.receipt import RECEIPT_DOMAIN
from pinaivu_box.store import integrity
from pinaivu_box.store import log as store
from pinaivu_box.store.log import Log

Kind = Literal["changed", "unsigned", "removed", "inserted", "rewritten", "forged"]
TAIL = 256  # receipts that are looked at before those that no checkpoint covers

ROWS = (
    "SELECT e.id, e.hash, r.request_id, r.signed, r.signature FROM log_entries AS e"
    " LEFT JOIN receipts AS r ON r.log_entry = e.id WHERE e.id >= ? AND e.id < ? ORDER BY e.id"
)
_WITHOUT_ENTRY = "SELECT request_id FROM receipts WHERE log_entry IS NULL"
_BETWEEN_LOGS = "SELECT request_id FROM receipts WHERE log_entry >= ? AND log_entry < ?"


class LogFinding(Struct, frozen=True):
    """`message` is a clause."""

    kind: Kind
    message: str


class ExaminedReceipt(NamedTuple):
    request_id: str
    signed: bytes
    signature: bytes


class _Named(Struct):
    request_id: str


# Says what is wrong with a receipt in the log of that box, None if nothing is.
Check = Callable[[str, ExaminedReceipt], str | None]


def check_signature(node_id: str, receipt: ExaminedReceipt) -> str | None:
    """Whether the box has signed a receipt, about the request which it is stored for."""
    if not identities.verify(node_id, RECEIPT_DOMAIN, receipt.signed, receipt.signature):
        return "is not signed by this box"
    named = msgspec.json.decode(receipt.signed, type=_Named).request_id
    return None if named == receipt.request_id else f"is that of {named}"


def tail(path: Path) -> list[LogFinding]:
    """What is wrong with the last receipts: those that no checkpoint covers, and the last 256 that
    one does; and with receipts that have no entry.  Raises sqlite3.Error."""
    with integrity.reading(path) as connection:
        connection.execute("BEGIN")
        examination = Examination(connection, check_signature)
        examination.tail()
        return examination.findings


def everything(
    connection: sqlite3.Connection, check: Check, shown: Checkpoint | None
) -> Examination:
    """What is wrong with the logs and all receipts, each of which `check` looks at; `shown` is the
    last checkpoint that the box has shown.  Raises sqlite3.Error."""
    connection.execute("BEGIN")
    examination = Examination(connection, check, shown)
    examination.everything()
    return examination


class Examination:
    def __init__(
        self,
        connection: sqlite3.Connection,
        check: Check,
        shown: Checkpoint | None = None,
    ) -> None:
        self._shown = shown
        self._connection = connection
        self._check = check
        self._first: dict[tuple[Kind, str], str] = {}  # whom it was found at first
        self._counts: dict[tuple[Kind, str], int] = {}
        self.entries = self.receipts = 0
        self.logs: list[Log] = []
        for row in connection.execute(store.LOGS):
            log = Log(*row)
            if log.node_id:
                self.logs.append(log)
            else:
                self.note("forged", "is not one of a box", "the origin of a log")

    @property
    def findings(self) -> list[LogFinding]:
        return [
            LogFinding(kind, _clause(self._first[kind, what], what, count))
            for (kind, what), count in self._counts.items()
        ]

    def tail(self) -> None:
        if not self.logs:
            return
        log = self.logs[-1]
        (covered,) = self._connection.execute(
            "SELECT coalesce(max(size), 0) FROM log_checkpoints WHERE log = ?", (log.id,)
        ).fetchone()
        first = log.first_entry + max(0, covered - TAIL)
        removed = self._removed(log)
        for entry, digest, receipt in self._rows(first, self._end(log)):
            self._look_at(log, entry - log.first_entry, digest, receipt, removed)
        self._look_for_inserted()

    def everything(self) -> None:
        ended = -(2**63)
        for log in self.logs:
            if log is not self.logs[0] and not self._is_begun(log):
                self.note("forged", "is not signed by this box", "the beginning of a log")
            self._examine(log)
            self._note_inserted(_BETWEEN_LOGS, ended, log.first_entry)
            ended = self._end(log)
        self._note_inserted(_BETWEEN_LOGS, ended, 2**63 - 1)
        if self._shown is not None:
            self._compare_origin(self._shown)
        self._look_for_inserted()

    def _compare_origin(self, shown: Checkpoint) -> None:
        if checkpoint.epoch_of(shown.origin) > max((log.epoch for log in self.logs), default=0):
            what = f"is older than the checkpoint of {shown.size} entries that the box has shown"
            self.note("rewritten", what, "the log")

    def note(self, kind: Kind, what: str, subject: str) -> None:
        self._first.setdefault((kind, what), subject)
        self._counts[kind, what] = self._counts.get((kind, what), 0) + 1

    def _end(self, log: Log) -> int:
        """The id after that of the last entry."""
        if log.size is not None:
            return log.first_entry + log.size
        return (
            int(self._connection.execute("SELECT max(id) FROM log_entries").fetchone()[0] or 0) + 1
        )

    def _rows(self, first: int, end: int) -> Iterator[tuple[int, bytes, ExaminedReceipt | None]]:
        for entry, digest, request_id, signed, signature in self._connection.execute(
            ROWS, (first, end)
        ):
            has_receipt = request_id is not None
            receipt = ExaminedReceipt(request_id, signed, signature) if has_receipt else None
            yield entry, digest, receipt

    def _is_begun(self, log: Log) -> bool:
        """Whether the box has signed why the log begins."""
        if log.restart is None or log.signature is None:
            return False
        try:
            said = restart.read(SignedRestart(log.restart.decode(), log.signature.hex()))
        except (NoteError, UnicodeDecodeError):
            return False
        return said.origin == log.origin and said.node_id == log.node_id

    def _examine(self, log: Log) -> None:
        removed, growth = self._removed(log), _Growth(self, log)
        for entry, digest, receipt in self._rows(log.first_entry, self._end(log)):
            self._look_at(log, entry - log.first_entry, digest, receipt, removed)
            growth.append(entry - log.first_entry, digest)
        growth.end()
        self.entries += growth.size

    def _look_at(
        self,
        log: Log,
        index: int,
        digest: bytes,
        receipt: ExaminedReceipt | None,
        removed: list[Range],
    ) -> None:
        if receipt is None:
            if not _contains(removed, index):
                what = "has no receipt any more, and the box did not delete it"
                self.note("removed", what, f"entry {index}")
            return
        self.receipts += 1
        subject = f"the receipt of {receipt.request_id}"
        if entry_of(receipt.signed) != digest:
            self.note("changed", "is not the one that was logged", subject)
        elif wrong := self._check(log.node_id, receipt):
            self.note("unsigned", wrong, subject)

    def _look_for_inserted(self) -> None:
        pending = self._connection.execute(
            "SELECT 1 FROM log_pending WHERE task = ?", (store.ADOPT,)
        ).fetchone()
        if not pending:
            self._note_inserted(_WITHOUT_ENTRY)

    def _note_inserted(self, query: str, *parameters: int) -> None:
        for (request_id,) in self._connection.execute(query, parameters):
            self.note("inserted", "was never logged", f"the receipt of {request_id}")

    def _removed(self, log: Log) -> list[Range]:
        ranges: list[Range] = []
        for signed, signature in self._connection.execute(
            "SELECT signed, signature FROM log_removals WHERE log = ?", (log.id,)
        ):
            try:
                said = removal.read(log.node_id, signed, signature)
            except NoteError:
                said = None
            if said is not None and said.origin == log.origin:
                ranges += said.entries
            else:
                self.note("forged", "is not signed by this box", "a record of deletions")
        return removal.joined(ranges)

    def checkpoints(self, log: Log) -> list[Checkpoint]:
        """Those that the box has signed, by their sizes."""
        found = [self._shown] if self._shown and self._shown.origin == log.origin else []
        for size, text in self._connection.execute(
            "SELECT size, note FROM log_checkpoints WHERE log = ? ORDER BY size", (log.id,)
        ):
            said = read_checkpoint(text)
            if said is not None and (said.origin, said.size) == (log.origin, size):
                found.append(said)
            else:
                self.note(
                    "forged", "is not signed by this box", f"the checkpoint of {size} entries"
                )
        return sorted(set(found), key=lambda said: said.size)

    def tile(self, log: Log, level: int, number: int) -> bytes:
        row = self._connection.execute(store.TILE, (log.id, level, number)).fetchone()
        return bytes(row[2]) if row else b""


class _Growth:
    """Computes a tree entry by entry, and compares it with checkpoints and stored hashes."""

    def __init__(self, examination: Examination, log: Log) -> None:
        self._examination = examination
        self._log = log
        self._checkpoints = examination.checkpoints(log)[::-1]  # the next one is the last
        self._subtrees: list[bytes] = []  # the complete ones, the largest first
        self._tiles: dict[int, tuple[int, bytes]] = {}  # of each level, the number and the hashes
        self._whole = True  # no entry is missing so far
        self.size = 0
        self._compare()

    def append(self, index: int, entry: bytes) -> None:
        if index != self.size and self._whole:
            self._whole = False
            self._examination.note("rewritten", "is missing", f"entry {self.size} of the log")
        self.size += 1
        if not self._whole:
            return
        self._subtrees.append(merkle.leaf_hash(entry))
        level = 0
        while self.size >> level & 1 == 0:
            right = self._subtrees.pop()
            self._subtrees.append(merkle.node_hash(self._subtrees.pop(), right))
            level += 1
            if level % tiles.HEIGHT == 0:
                self._compare_stored(level, (self.size >> level) - 1)
        self._compare()

    def end(self) -> None:
        if not self._whole or self._log.size is not None:
            return  # why it has ended is said where the next one begins
        for said in reversed(self._checkpoints):
            what = f"has {self.size} entries, and its checkpoint {said.size}"
            self._examination.note("rewritten", what, "the log")
            return

    def _compare(self) -> None:
        while self._checkpoints and self._checkpoints[-1].size == self.size:
            said = self._checkpoints.pop()
            root = self._subtrees[-1] if self._subtrees else merkle.EMPTY_ROOT
            for left in self._subtrees[-2::-1]:
                root = merkle.node_hash(left, root)
            if root != said.root:
                what = "does not lead to a checkpoint that the box has signed"
                subject = f"the log with its first {self.size} entries"
                self._examination.note("rewritten", what, subject)

    def _compare_stored(self, level: int, index: int) -> None:
        stored_level, number = level // tiles.HEIGHT, index // tiles.WIDTH
        if self._tiles.get(stored_level, (-1, b""))[0] != number:
            data = self._examination.tile(self._log, stored_level, number)
            self._tiles[stored_level] = (number, data)
        first = index % tiles.WIDTH * HASH_BYTES
        stored = self._tiles[stored_level][1][first : first + HASH_BYTES]
        if stored and stored != self._subtrees[-1]:
            what = "is not the one of its entries"
            self._examination.note("rewritten", what, "a stored hash of the log")


def read_checkpoint(text: str) -> Checkpoint | None:
    """A checkpoint if the box has signed it whose log it is about."""
    try:
        signed = note.read(text)
        said = checkpoint.read(signed)
    except NoteError:
        return None
    return said if checkpoint.is_signed(signed, said) else None


def _contains(ranges: list[Range], index: int) -> bool:
    at = bisect_right(ranges, (index, 2**63)) - 1
    return at >= 0 and index <= ranges[at][1]


def _clause(subject: str, what: str, count: int) -> str:
    more = f" (and {count - 1:,} more)" if count > 1 else ""
    return f"{subject}{more} {what}"

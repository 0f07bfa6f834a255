"""The log of receipts on disk: its histories, entries, tiles, checkpoints and removals.

The index of an entry is its id less that of the first one in its log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import Struct

from pinaivu_box.errors import StoreError
from pinaivu_box.log import checkpoint
from pinaivu_box.log.entry_proof import entry_of
from pinaivu_box.log.merkle import HASH_BYTES
from pinaivu_box.log.note import NoteError
from pinaivu_box.log.removal import Range
from pinaivu_box.store.database import Database, SqlStatement

KEPT_CHECKPOINTS = 1000  # of each log, the newest
ADOPT, RESTORED = "adopt", "restored"  # tasks that are pending

ENDS = (
    "SELECT (SELECT seq FROM sqlite_sequence WHERE name = 'log_entries') AS given,"
    " (SELECT max(id) FROM log_entries) AS there"
)
ENTRIES = "SELECT id, hash FROM log_entries WHERE id >= ? AND id < ?"
CHECKPOINT = "SELECT size, note FROM log_checkpoints WHERE log = ? ORDER BY size DESC LIMIT 1"
CHECKPOINT_OVER = (
    "SELECT * FROM (SELECT size, note FROM log_checkpoints INDEXED BY log_checkpoints_cosigned"
    " WHERE log = ? AND size > ? AND cosigned > 0 ORDER BY size DESC LIMIT 1) UNION ALL"
    " SELECT * FROM (SELECT size, note FROM log_checkpoints"
    " WHERE log = ? AND size > ? ORDER BY size DESC LIMIT 1) LIMIT 1"
)
LAST_REMOVAL = (
    "SELECT id, signed, signature FROM log_removals WHERE log = ? ORDER BY id DESC LIMIT 1"
)
TILE = "SELECT level, number, hashes FROM log_tiles WHERE log = ? AND level = ? AND number = ?"
LAST_TILE = (
    "SELECT number, length(hashes) FROM log_tiles WHERE log = ? AND level = ?"
    " ORDER BY number DESC LIMIT 1"
)
LOGS = "SELECT id, origin, first_entry, size, restart, signature FROM logs ORDER BY id"
_OLD_CHECKPOINTS = (
    "DELETE FROM log_checkpoints WHERE log = ?1 AND size < coalesce((SELECT size"
    f" FROM log_checkpoints WHERE log = ?1 ORDER BY size DESC LIMIT 1 OFFSET {KEPT_CHECKPOINTS - 1}"
    "), 0)"
)


class LogDamaged(StoreError):
    """The stored log is not what was signed; the message is a clause that says how."""


class Log(Struct, frozen=True):
    """One history; `size` is None while it goes on."""

    id: int
    origin: str
    first_entry: int
    size: int | None = None
    restart: bytes | None = None
    signature: bytes | None = None

    @property
    def node_id(self) -> str:
        """Of the box that signs it; "" if its origin is none."""
        try:
            return checkpoint.node_of(self.origin)
        except NoteError:
            return ""

    @property
    def epoch(self) -> int:
        """Unix milliseconds; 0 if its origin is none."""
        try:
            return checkpoint.epoch_of(self.origin)
        except NoteError:
            return 0

    def has(self, entry: int) -> bool:
        return entry >= self.first_entry and (
            self.size is None or entry < self.first_entry + self.size
        )


class StoredCheckpoint(NamedTuple):
    size: int
    note: str


class LoggedReceipt(NamedTuple):
    signed: bytes
    entry: int | None  # its id; None: it has none


class StoredRemoval(NamedTuple):
    id: int
    signed: bytes
    signature: bytes


def append(signed: bytes) -> SqlStatement:
    """Followed by that of the receipt, whose `log_entry` is `last_insert_rowid()`."""
    return "INSERT INTO log_entries (hash) VALUES (?)", (entry_of(signed),)


async def logs(database: Database) -> list[Log]:
    """The oldest first."""
    return [Log(*row) for row in await database.read(LOGS)]


async def pending(database: Database) -> set[str]:
    return {task for (task,) in await database.read("SELECT task FROM log_pending")}


def done(task: str) -> SqlStatement:
    return "DELETE FROM log_pending WHERE task = ?", (task,)


def to_do(task: str) -> SqlStatement:
    return "INSERT OR IGNORE INTO log_pending VALUES (?)", (task,)


def begin(origin: str, restart: bytes | None, signature: bytes | None) -> SqlStatement:
    """With the entry that comes next, even if the last ones were deleted."""
    return (
        "INSERT INTO logs (origin, first_entry, restart, signature)"
        f" SELECT ?, 1 + max(coalesce(given, 0), coalesce(there, 0)), ?, ? FROM ({ENDS})",
        (origin, restart, signature),
    )


def end(log: Log, size: int) -> list[SqlStatement]:
    """The log ends with that many entries; the receipts of others are to get entries again."""
    return [
        ("UPDATE logs SET size = ? WHERE id = ?", (size, log.id)),
        ("UPDATE receipts SET log_entry = NULL WHERE log_entry >= ?", (log.first_entry + size,)),
        to_do(ADOPT),
    ]


def set_restart(log: Log, signed: bytes, signature: bytes) -> SqlStatement:
    """What was said once stays said."""
    return (
        "UPDATE logs SET restart = ?, signature = ? WHERE id = ? AND restart IS NULL",
        (signed, signature, log.id),
    )


async def _ends(database: Database) -> tuple[int, int]:
    """The last id that was given to an entry, and the last one that is there."""
    ((given, there),) = await database.read(ENDS)
    return max(given or 0, there or 0), there or 0


async def size(database: Database, log: Log) -> int:
    """How many entries it has.  Raises LogDamaged if its last ones are missing."""
    given, there = await _ends(database)
    if there < given and given >= log.first_entry:
        raise LogDamaged("its last entries are missing")
    return max(0, given + 1 - log.first_entry)


async def entries(
    database: Database, log: Log, ranges: Sequence[tuple[int, int]]
) -> list[list[bytes]]:
    """Those of each range of indices, which has an end.  Raises LogDamaged if one is missing."""
    wanted = [(log.first_entry + first, log.first_entry + end) for first, end in ranges]
    if not wanted:
        return []
    sql = " UNION ALL ".join([ENTRIES] * len(wanted))
    rows = await database.read(sql, [bound for bounds in wanted for bound in bounds])
    found = {row[0]: row[1] for row in rows}
    try:
        return [[found[entry] for entry in range(*bounds)] for bounds in wanted]
    except KeyError as error:
        raise LogDamaged(f"its entry {error.args[0] - log.first_entry} is missing") from None


async def receipt(database: Database, request_id: str) -> LoggedReceipt | None:
    rows = await database.read(
        "SELECT signed, log_entry FROM receipts WHERE request_id = ?", (request_id,)
    )
    return LoggedReceipt(*rows[0]) if rows else None


async def stored_tiles(
    database: Database, log: Log, places: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], bytes]:
    """The hashes of tiles by level and number, none of those that are not stored."""
    if not places:
        return {}
    sql = " UNION ALL ".join([TILE] * len(places))
    rows = await database.read(sql, [value for place in places for value in (log.id, *place)])
    return {(level, number): hashes for level, number, hashes in rows}


async def stored_hashes(database: Database, log: Log, level: int) -> tuple[int, int]:
    """The number of the last tile of a level, and how many hashes it has."""
    rows = await database.read(LAST_TILE, (log.id, level))
    return (rows[0][0], rows[0][1] // HASH_BYTES) if rows else (0, 0)


def put_tile(log: Log, level: int, number: int, hashes: bytes) -> SqlStatement:
    """One that is stored with as many hashes or more stays."""
    return (
        "INSERT INTO log_tiles VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
        " SET hashes = excluded.hashes WHERE length(excluded.hashes) > length(hashes)",
        (log.id, level, number, hashes),
    )


def forget_tiles(log: Log) -> SqlStatement:
    return "DELETE FROM log_tiles WHERE log = ?", (log.id,)


async def last_checkpoint(database: Database, log: Log) -> StoredCheckpoint | None:
    rows = await database.read(CHECKPOINT, (log.id,))
    return StoredCheckpoint(*rows[0]) if rows else None


async def checkpoints(database: Database, log: Log) -> list[StoredCheckpoint]:
    """All that are kept, the newest first."""
    rows = await database.read(
        "SELECT size, note FROM log_checkpoints WHERE log = ? ORDER BY size DESC", (log.id,)
    )
    return [StoredCheckpoint(*row) for row in rows]


async def checkpoint_over(database: Database, log: Log, index: int) -> StoredCheckpoint | None:
    """The newest with cosignatures that covers the entry with this index; else the newest that
    does."""
    rows = await database.read(CHECKPOINT_OVER, (log.id, index, log.id, index))
    return StoredCheckpoint(*rows[0]) if rows else None


async def checkpoint_of_size(database: Database, log: Log, of: int) -> StoredCheckpoint | None:
    rows = await database.read(
        "SELECT size, note FROM log_checkpoints WHERE log = ? AND size = ?", (log.id, of)
    )
    return StoredCheckpoint(*rows[0]) if rows else None


def put_checkpoint(log: Log, of: int, at: int, note: str) -> list[SqlStatement]:
    """Store one, at that time (Unix milliseconds), and forget the oldest ones; one that is stored
    of this size stays."""
    return [
        (
            "INSERT OR IGNORE INTO log_checkpoints (log, size, at, note) VALUES (?, ?, ?, ?)",
            (log.id, of, at, note),
        ),
        (_OLD_CHECKPOINTS, (log.id,)),
    ]


def replace_note(log: Log, of: int, note: str, cosigned: int) -> SqlStatement:
    return (
        "UPDATE log_checkpoints SET note = ?, cosigned = ? WHERE log = ? AND size = ?",
        (note, cosigned, log.id, of),
    )


async def last_removal(database: Database, log: Log) -> StoredRemoval | None:
    rows = await database.read(LAST_REMOVAL, (log.id,))
    return StoredRemoval(*rows[0]) if rows else None


def put_removal(log: Log, of: int | None, signed: bytes, signature: bytes) -> SqlStatement:
    """A new one, or in the place of the one with that id."""
    return "INSERT OR REPLACE INTO log_removals VALUES (?, ?, ?, ?)", (
        of,
        log.id,
        signed,
        signature,
    )


def indices(log: Log, ids: Sequence[int]) -> list[Range]:
    """The indices of the entries with these ids that are in the log, each as a range."""
    return [(n - log.first_entry, n - log.first_entry) for n in ids if log.has(n)]

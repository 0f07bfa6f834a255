"""Deletes old rows and rolls hours of usage up to days.

It works in small transactions and pauses for as long after each, so the end of a request waits for
one of them at most.  Hours add themselves to their day as they are deleted (schema.sql), so it can
be interrupted anywhere.

The clock may be wrong.  If it has leapt by more than a day, it is trusted after another day: a
clock that is a year ahead for an hour deletes nothing.  If it was set back by more than a day
before the leap, it was behind: receipts and stored responses of that time get the date of the leap,
since by their own dates they would be old.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec

from pinaivu_box.config import RetentionConfig, parse_duration
from pinaivu_box.store import incidents, sessions, usage
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.times import now_ms

log = logging.getLogger("pinaivu.retention")

MAX_ROWS = 200  # in a transaction
_OWNERS_PER_PAGE = 500
_INTERVAL_SECONDS = 3600.0
_DAY_MS = 86_400_000
_MAX_BEHIND_MS = 30 * _DAY_MS  # rows with a new date are kept longer by this at most
_UNSEEN_MS = 2 * 3_600_000  # more than passes from one look at the clock to the next


def _delete(table: str, key: str, condition: str) -> str:
    """The statement that deletes at most ?1 rows of a table."""
    return (
        f"DELETE FROM {table} WHERE ({key}) IN"
        f" (SELECT {key} FROM {table} WHERE {condition} LIMIT ?1)"
    )


OLD_ROWS = {
    "requests": _delete("requests", "request_id", "created_at < ?2"),
    "receipts": "SELECT rowid, log_entry FROM receipts WHERE created_at < ?2 LIMIT ?1",
    "responses": _delete("responses", "rowid", "created_at < ?2"),
}
# Whose age no setting says: statement and milliseconds.  A run is deleted when nothing of it is as
# young as what is kept.
OF_FIXED_AGE = (
    (
        _delete("incidents", "id", "began_at < ?2 AND ended_at IS NOT NULL"),
        incidents.KEPT_MS,
    ),
    (_delete("runs", "id", "seen_at < ?2"), incidents.KEPT_MS),
    (
        _delete("latencies_by_hour", "since, kind, ms", "since < ?2"),
        usage.LATENCIES_BY_HOUR_KEPT_MS,
    ),
)
NEW_DATES = tuple(
    f"UPDATE {table} SET created_at = ?4 WHERE rowid IN (SELECT rowid FROM {table}"
    " WHERE created_at >= ?2 AND created_at < ?3 LIMIT ?1)"
    for table in ("receipts", "responses")
)
_HOURS = f"since % {_DAY_MS} <> 0"  # midnight is that of a day
HOURS = _delete(
    "usage",
    "key_id, since, model, node_id",
    f"key_id IN (SELECT value FROM json_each(?2)) AND since > ?3 AND since < ?3 + {_DAY_MS}",
)
# With `since` first, SQLite would use the index for that column alone.
HOURS_OF_REFUSALS = _delete("refusals", "key_id, since, model, code", f"since < ?2 AND {_HOURS}")
DAYS = (
    f"SELECT DISTINCT since - since % {_DAY_MS} FROM usage"
    f" WHERE key_id = '' AND since < ? AND {_HOURS} ORDER BY 1"
)
OWNERS = (  # of sums of usage
    "SELECT id FROM keys WHERE id > ?1"
    " UNION ALL SELECT id FROM accounts WHERE id > ?1 ORDER BY id LIMIT ?2"
)


# The statements that record, in the transaction that deletes receipts, that those of the entries
# with these ids were deleted: the log shows that they were there.
Removals = Callable[[Sequence[int]], Awaitable[Sequence[SqlStatement]]]
# Of pairs of a row and its entry: one that has got another entry meanwhile stays for the next look.
_DELETE_RECEIPTS = (
    "DELETE FROM receipts WHERE rowid IN (SELECT r.rowid FROM json_each(?) AS pair"
    " JOIN receipts AS r ON r.rowid = json_extract(pair.value, '$[0]')"
    " WHERE r.log_entry IS json_extract(pair.value, '$[1]'))"
)


async def apply_hourly(
    database: Database, policy: Callable[[], RetentionConfig], removals: Removals
) -> None:
    """Apply the policy each hour, until it is cancelled; errors are logged."""
    while True:
        try:
            now = await believed(database, now_ms())
            await apply(database, policy(), now, removals)
            await database.write(*sessions.delete_ended(now))
        except Exception:
            log.exception("old rows could not be deleted, the next hour tries again")
        await asyncio.sleep(_INTERVAL_SECONDS)


class ClockTrust(msgspec.Struct, frozen=True):
    """What is known of the clock when it was `seen` last: it is trusted up to `believed`, has been
    `doubted` since a leap, if so, and was set back to `behind`, if so.  Unix milliseconds."""

    seen: int
    believed: int
    doubted: int | None = None
    behind: int | None = None

    def at(self, now: int) -> ClockTrust:
        """The trust in the clock now that it shows `now`."""
        before = self.seen if self.doubted is None else self.doubted
        if now < before and self.doubted is not None and now > self.believed + _DAY_MS:
            return ClockTrust(now, self.believed, now)  # set back a little: the leap remains
        if now < before:  # it was set back
            return ClockTrust(now, now, None, now if now < before - _DAY_MS else self.behind)
        if now > self.seen + _DAY_MS:
            # If an earlier leap was right, time has gone on from there.
            return ClockTrust(now, self.seen if self.doubted is None else self.doubted, now)
        if self.doubted is not None and now < self.doubted + _DAY_MS:
            return ClockTrust(now, self.believed, self.doubted)
        return ClockTrust(now, now, None, self.behind)


async def believed(database: Database, now: int) -> int:
    """The time up to which a clock that shows `now` is trusted, in Unix milliseconds."""
    rows = await database.read("SELECT seen, believed, doubted, behind FROM clock WHERE id = 1")
    before = ClockTrust(*rows[0]) if rows else ClockTrust(now, now)
    after = before.at(now)
    if after.doubted == now:
        log.info("the clock is far from where it was seen last: old rows wait for a day")
        if before.behind is not None and before.seen - before.behind <= _MAX_BEHIND_MS:
            for statement in NEW_DATES:
                await _repeat(database, statement, before.behind, before.seen + _UNSEEN_MS, now)
    await database.write(
        (
            "INSERT OR REPLACE INTO clock (id, seen, believed, doubted, behind)"
            " VALUES (1, ?, ?, ?, ?)",
            msgspec.structs.astuple(after),
        )
    )
    return after.believed


async def apply(database: Database, policy: RetentionConfig, now: int, removals: Removals) -> None:
    """Delete what is too old at `now` (Unix milliseconds), and roll up the days before."""
    for table, statement in OLD_ROWS.items():
        kept_ms = parse_duration(getattr(policy, table)) * 1000
        if kept_ms >= 0:
            before = now - round(kept_ms)
            if table == "receipts":
                await _remove_receipts(database, before, removals)
                continue
            await _repeat(database, statement, before)
            if table == "requests":
                await _roll_up(database, before - before % _DAY_MS)
    for statement, kept_for in OF_FIXED_AGE:
        await _repeat(database, statement, now - kept_for)


async def _remove_receipts(database: Database, before: int, removals: Removals) -> None:
    count = MAX_ROWS
    while count == MAX_ROWS:
        began = time.monotonic()
        rows = await database.read(OLD_ROWS["receipts"], (MAX_ROWS, before))
        if count := len(rows):
            recorded = await removals([entry for _, entry in rows if entry is not None])
            pairs = msgspec.json.encode([tuple(row) for row in rows]).decode()
            await database.write(*recorded, (_DELETE_RECEIPTS, (pairs,)))
        await asyncio.sleep(time.monotonic() - began)


async def _roll_up(database: Database, before: int) -> None:
    """Roll up the days before a midnight."""
    await _repeat(database, HOURS_OF_REFUSALS, before)
    for (day,) in await database.scan(DAYS, (before,)):
        async for keys in _pages_of_owners(database):
            await _repeat(database, HOURS, msgspec.json.encode(keys).decode(), day)


async def _pages_of_owners(database: Database) -> AsyncIterator[list[str]]:
    """All keys and accounts, and last '', the box: a day with hours of the box is not complete."""
    last = ""
    while page := [row[0] for row in await database.read(OWNERS, (last, _OWNERS_PER_PAGE))]:
        yield page
        last = page[-1]
    yield [""]


async def _repeat(database: Database, statement: str, *parameters: Any) -> None:
    """Run a statement until there is nothing left for it to do."""
    row_count = MAX_ROWS
    while row_count == MAX_ROWS:
        began = time.monotonic()
        (row_count,) = await database.write((statement, (MAX_ROWS, *parameters)))
        await asyncio.sleep(time.monotonic() - began)

"""What is old goes: rows are deleted, hours of usage are left as days.

In small transactions, after each of which others have as long for theirs: whoever settles a request
waits for one of them at most.  Hours add themselves to their day as they are deleted (migrations),
so it may end anywhere, and begin again.

What is old is said by a clock that may be wrong.  After more than a day without a look at it, it is
believed once it has gone on for another day: a clock that is a year ahead for an hour deletes
nothing.  And a receipt or a stored answer that came after one that is kept is kept as well: it is
not old, the clock was behind.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from pinaivu_box.config import RetentionConfig, parse_duration
from pinaivu_box.store.database import Database

log = logging.getLogger("pinaivu.retention")

BITE = 200  # rows in a transaction
_PAGE = 500  # keys that are looked at together
_EVERY_SECONDS = 3600.0
_DAY_MS = 86_400_000


def _some(table: str, key: str, condition: str) -> str:
    """Deletes at most ?1 of those rows."""
    return (
        f"DELETE FROM {table} WHERE ({key}) IN"
        f" (SELECT {key} FROM {table} WHERE {condition} LIMIT ?1)"
    )


OLD_ROWS = {
    "requests": _some("requests", "request_id", "created_at < ?2"),
    "receipts": _some("receipts", "rowid", "created_at < ?2 AND +rowid < ?3"),
    "responses": _some("responses", "rowid", "created_at < ?2 AND +rowid < ?3"),
}
# The first to come of those that are kept; what is from the future says nothing about others.
FIRST_KEPT = {
    table: f"SELECT min(+rowid) FROM {table} WHERE created_at >= ?1 AND created_at <= ?2"
    for table in ("receipts", "responses")
}
_LAST_ROWID = 2**63 - 1
_HOURS = f"since % {_DAY_MS} <> 0"  # those of midnight are their days' already
HOURS = _some(
    "usage",
    "key_id, since, model, node_id",
    f"key_id IN (SELECT value FROM json_each(?2)) AND since > ?3 AND since < ?3 + {_DAY_MS}",
)
# With `since` first, SQLite would look for each row with that column alone.
HOURS_OF_REFUSALS = _some("refusals", "key_id, since, model, code", f"since < ?2 AND {_HOURS}")
DAYS = (
    f"SELECT DISTINCT since - since % {_DAY_MS} FROM usage"
    f" WHERE key_id = '' AND since < ? AND {_HOURS} ORDER BY 1"
)
OWNERS = (  # of sums: keys and accounts
    "SELECT id FROM keys WHERE id > ?1"
    " UNION ALL SELECT id FROM accounts WHERE id > ?1 ORDER BY id LIMIT ?2"
)


async def apply_hourly(database: Database, policy: Callable[[], RetentionConfig]) -> None:
    """Until it is cancelled; what goes wrong is logged, and tried again an hour later."""
    while True:
        try:
            now = time.time_ns() // 1_000_000
            await apply(database, policy(), now, await believed(database, now))
        except Exception:
            log.exception("old rows could not be deleted, the next hour tries again")
        await asyncio.sleep(_EVERY_SECONDS)


async def believed(database: Database, now: int) -> int:
    """Up to when the clock is believed that says it is `now` (Unix milliseconds)."""
    found = await database.read("SELECT seen, believed, doubted FROM clock")
    until, doubted = _believed(now, *found[0]) if found else (now, None)
    if doubted == now:
        log.info("the clock is far from where it was seen last: old rows wait for a day")
    await database.write(
        (
            "INSERT OR REPLACE INTO clock (id, seen, believed, doubted) VALUES (1, ?, ?, ?)",
            (now, until, doubted),
        )
    )
    return until


def _believed(now: int, seen: int, until: int, doubted: int | None) -> tuple[int, int | None]:
    """Until when, and since when no longer, if so."""
    if now < (seen if doubted is None else doubted):  # it was set back
        return now, None
    if now > seen + _DAY_MS:  # the leap before, if there was one, was none: time went on from there
        return (seen if doubted is None else doubted), now
    if doubted is not None and now < doubted + _DAY_MS:
        return until, doubted
    return now, None


async def apply(
    database: Database, policy: RetentionConfig, now: int, until: int | None = None
) -> None:
    """Delete what is too old at `now` (Unix milliseconds), and roll up the days before that;
    `until`: when that is, for a clock that is not believed."""
    until = now if until is None else min(now, until)
    for table, statement in OLD_ROWS.items():
        kept = parse_duration(getattr(policy, table)) * 1000
        if kept >= 0:
            await _delete_old(database, table, statement, until - round(kept), now)
    kept = parse_duration(policy.requests) * 1000
    if kept >= 0:
        before = until - round(kept)
        await _roll_up(database, before - before % _DAY_MS)


async def _delete_old(
    database: Database, table: str, statement: str, before: int, now: int
) -> None:
    more: tuple[int, ...] = ()
    if table in FIRST_KEPT:
        (first,) = (await database.scan(FIRST_KEPT[table], (before, now)))[0]
        more = (_LAST_ROWID if first is None else first,)
    await _repeat(database, statement, before, *more)


async def _roll_up(database: Database, before: int) -> None:
    """`before`: a midnight."""
    await _repeat(database, HOURS_OF_REFUSALS, before)
    for (day,) in await database.scan(DAYS, (before,)):
        async for keys in _pages_of_owners(database):
            await _repeat(database, HOURS, msgspec.json.encode(keys).decode(), day)


async def _pages_of_owners(database: Database) -> AsyncIterator[list[str]]:
    """All keys and accounts; at the end '', the box: as long as it has hours, a day is not done."""
    last = ""
    while page := [row[0] for row in await database.read(OWNERS, (last, _PAGE))]:
        yield page
        last = page[-1]
    yield [""]


async def _repeat(database: Database, statement: str, *parameters: Any) -> None:
    """Until there is nothing left for it to delete."""
    deleted = BITE
    while deleted == BITE:
        began = time.monotonic()
        (deleted,) = await database.write((statement, (BITE, *parameters)))
        await asyncio.sleep(time.monotonic() - began)

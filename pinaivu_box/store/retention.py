"""What is old goes: rows are deleted, hours of usage are left as days.

In small transactions, after each of which others have as long for theirs: whoever settles a request
waits for one of them at most.  Hours add themselves to their day as they are deleted (schema.sql),
so it may end anywhere, and begin again.

What is old is said by a clock that may be wrong.  After more than a day without a look at it, it is
believed once it has gone on for another day: a clock that is a year ahead for an hour deletes
nothing.  If it was set back by more than a day before it leapt, it was behind: receipts and stored
answers of that time are dated to the leap, for by their own dates they would be old.
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
_LONGEST_BEHIND_MS = 30 * _DAY_MS  # what is dated anew is kept longer by this at most
_UNSEEN_MS = 2 * 3_600_000  # from one look at the clock to the next, and some more


def _some(table: str, key: str, condition: str) -> str:
    """Deletes at most ?1 of those rows."""
    return (
        f"DELETE FROM {table} WHERE ({key}) IN"
        f" (SELECT {key} FROM {table} WHERE {condition} LIMIT ?1)"
    )


OLD_ROWS = {
    "requests": _some("requests", "request_id", "created_at < ?2"),
    "receipts": _some("receipts", "rowid", "created_at < ?2"),
    "responses": _some("responses", "rowid", "created_at < ?2"),
}
DATED_ANEW = tuple(
    f"UPDATE {table} SET created_at = ?4 WHERE rowid IN (SELECT rowid FROM {table}"
    " WHERE created_at >= ?2 AND created_at < ?3 LIMIT ?1)"
    for table in ("receipts", "responses")
)
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
            now = await believed(database, time.time_ns() // 1_000_000)
            await apply(database, policy(), now)
        except Exception:
            log.exception("old rows could not be deleted, the next hour tries again")
        await asyncio.sleep(_EVERY_SECONDS)


class Belief(msgspec.Struct, frozen=True):
    """In a clock, as it was when it was `seen` last: `believed` up to then, `doubted` from then on,
    and set back to `behind`, if so."""

    seen: int
    believed: int
    doubted: int | None = None
    behind: int | None = None

    def look(self, now: int) -> Belief:
        before = self.seen if self.doubted is None else self.doubted
        if now < before and self.doubted is not None and now > self.believed + _DAY_MS:
            return Belief(now, self.believed, now)  # set back a little: it leapt all the same
        if now < before:  # it was set back
            return Belief(now, now, None, now if now < before - _DAY_MS else self.behind)
        if now > self.seen + _DAY_MS:
            # If the leap before was none, time has gone on from there.
            return Belief(now, self.seen if self.doubted is None else self.doubted, now)
        if self.doubted is not None and now < self.doubted + _DAY_MS:
            return Belief(now, self.believed, self.doubted)
        return Belief(now, now, None, self.behind)


async def believed(database: Database, now: int) -> int:
    """Up to when the clock is believed that says it is `now` (Unix milliseconds)."""
    found = await database.read("SELECT seen, believed, doubted, behind FROM clock WHERE id = 1")
    before = Belief(*found[0]) if found else Belief(now, now)
    after = before.look(now)
    if after.doubted == now:
        log.info("the clock is far from where it was seen last: old rows wait for a day")
        if before.behind is not None and before.seen - before.behind <= _LONGEST_BEHIND_MS:
            for statement in DATED_ANEW:
                await _repeat(database, statement, before.behind, before.seen + _UNSEEN_MS, now)
    await database.write(
        (
            "INSERT OR REPLACE INTO clock (id, seen, believed, doubted, behind)"
            " VALUES (1, ?, ?, ?, ?)",
            msgspec.structs.astuple(after),
        )
    )
    return after.believed


async def apply(database: Database, policy: RetentionConfig, now: int) -> None:
    """Delete what is too old at `now` (Unix milliseconds), and roll up the days before that."""
    for table, statement in OLD_ROWS.items():
        kept = parse_duration(getattr(policy, table)) * 1000
        if kept >= 0:
            await _repeat(database, statement, now - round(kept))
    kept = parse_duration(policy.requests) * 1000
    if kept >= 0:
        before = now - round(kept)
        await _roll_up(database, before - before % _DAY_MS)


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
    """Until there is nothing left for it to do."""
    done = BITE
    while done == BITE:
        began = time.monotonic()
        (done,) = await database.write((statement, (BITE, *parameters)))
        await asyncio.sleep(time.monotonic() - began)

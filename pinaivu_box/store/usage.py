"""What was used: sums, latencies and errors, from what the database keeps by hour and by day."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from pinaivu_box.store.database import Database, Row, Statement

By = Literal["day", "hour", "key", "model", "node"]
BYS: tuple[By, ...] = ("day", "hour", "key", "model", "node")
Labels = tuple[str, ...]  # of a group, in the order of what it is grouped by

_COLUMNS: dict[By, str] = {
    "day": "strftime('%Y-%m-%d', since / 1000, 'unixepoch')",
    "hour": "strftime('%Y-%m-%dT%H:00:00Z', since / 1000, 'unixepoch')",
    "key": "key_id",
    "model": "model",
    "node": "node_id",
}


class Wanted(msgspec.Struct, frozen=True):
    """Which usage: of what began in [since, until), Unix milliseconds; None is everything.  A day
    that was rolled up counts as its first hour."""

    account_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    since: int | None = None
    until: int | None = None


class Sums(msgspec.Struct):
    """Of one group.  `amount` in 10^-9 of the currency; `ttft_ms` and `total_ms` say how many
    requests took at most so many milliseconds; `errors` are counted by code."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    amount: int = 0
    ttft_ms: Counter[int] = msgspec.field(default_factory=Counter)
    total_ms: Counter[int] = msgspec.field(default_factory=Counter)
    errors: Counter[str] = msgspec.field(default_factory=Counter)

    def add(self, other: Sums) -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


async def usage(
    database: Database, wanted: Wanted, by: tuple[By, ...], keys: list[str] | None = None
) -> dict[Labels, Sums]:
    """By group, in the order of their labels; only of those `keys`, if they are given."""
    used = await database.scan(*summed("usage", wanted, by, keys))
    waited: list[Row] = []
    if "hour" not in by:  # they are kept by day
        waited = await database.scan(*summed("latencies", wanted, by, keys))
    errors: list[Row] = []
    if "node" not in by:  # nobody has served what was refused
        errors = await database.scan(*summed("refusals", wanted, by, keys))
    # In a thread: there may be a hundred thousand rows, and streams go on meanwhile.
    return await asyncio.to_thread(_groups, used, waited, errors, len(by))


def _groups(
    used: list[Row], waited: list[Row], errors: list[Row], labels: int
) -> dict[Labels, Sums]:
    found: dict[Labels, Sums] = {}

    def group(row: Row) -> Sums:
        return found.setdefault(tuple(row[:labels]), Sums())

    for row in used:
        total = group(row)
        for name in _TOTALS:
            setattr(total, name, row[name])
    for row in waited:
        getattr(group(row), f"{row['kind']}_ms")[row["ms"]] += row["count"]
    for row in errors:
        group(row).errors[row["code"]] += row["count"]
    return dict(sorted(found.items()))


async def busiest(database: Database, wanted: Wanted, limit: int) -> list[str]:
    """Keys ('' for requests that had none), those that used most first."""
    return [row[0] for row in await database.scan(*ranked(wanted, limit))]


def ranked(wanted: Wanted, limit: int) -> Statement:
    conditions = _conditions(wanted, apart=True)
    # Key by key, so that only the rows of that time are read.
    used = _where([*conditions, "key_id IN (SELECT id FROM keys)"])
    return (
        "SELECT key_id FROM (SELECT key_id, prompt_tokens + completion_tokens AS tokens"
        f" FROM usage{used} UNION ALL SELECT key_id, 0 FROM refusals{_where(conditions)})"
        " GROUP BY key_id ORDER BY sum(tokens) DESC, key_id LIMIT ?",
        (*conditions.values(), *conditions.values(), limit),
    )


_TOTALS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "amount")


_TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # what is summed, and by what else
    "usage": (_TOTALS, ()),
    "latencies": (("count",), ("kind", "ms")),
    "refusals": (("count",), ("code",)),
}


def summed(table: str, wanted: Wanted, by: tuple[By, ...], keys: list[str] | None) -> Statement:
    """The statement that sums a table."""
    totals, also = _TABLES[table]
    columns = [f"{_COLUMNS[one]} AS by_{one}" for one in by]
    groups = ", ".join([*(f"by_{one}" for one in by), *also])
    selected = ", ".join([*columns, *also, *(f"sum({name}) AS {name}" for name in totals)])
    # The rows of keys are read if keys are to be told apart, else those of the account or the box.
    apart = table == "refusals" or "key" in by or wanted.key_id is not None
    conditions = _conditions(wanted, apart)
    if keys is not None:
        encoded = msgspec.json.encode(keys).decode()
        conditions = {"key_id IN (SELECT value FROM json_each(?))": encoded} | conditions
    parts = list(conditions)
    if wanted.account_id is None and not apart:
        parts.append("key_id = ''")
    elif table != "refusals" and "key" in by and keys is None:
        parts.append("key_id >= 'key_'")  # accounts, acct_..., come before
    grouped = f" GROUP BY {groups}" if groups else ""
    having = "" if groups else " HAVING count(*) > 0"  # sums of nothing are no row
    sql = f"SELECT {selected} FROM {table}{_where(parts)}{grouped}{having}"
    return sql, tuple(conditions.values())


def _conditions(wanted: Wanted, apart: bool) -> dict[str, Any]:
    """With their values; `apart`: of the rows of keys."""
    conditions: dict[str, Any] = {}
    if wanted.key_id is not None:
        conditions["key_id = ?"] = wanted.key_id
    if wanted.account_id is not None:
        whose = "key_id IN (SELECT id FROM keys WHERE account_id = ?)" if apart else "key_id = ?"
        conditions = {whose: wanted.account_id} | conditions
    given = {"model = ?": wanted.model, "since >= ?": wanted.since, "since < ?": wanted.until}
    return conditions | {text: value for text, value in given.items() if value is not None}


def _where(conditions: Iterable[str]) -> str:
    text = " AND ".join(conditions)
    return f" WHERE {text}" if text else ""

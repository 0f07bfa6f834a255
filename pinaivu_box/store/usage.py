"""What was used: sums, latencies and errors, from what the database keeps by hour and by day."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Literal

import msgspec

from pinaivu_box.store.database import Database, Row, Statement

By = Literal["day", "hour", "account", "key", "model", "node", "peer"]
BYS: tuple[By, ...] = ("day", "hour", "account", "key", "model", "node", "peer")
Who = Literal["account", "key"]
Level = Literal["account", "key", "box"]  # whose sums a row holds, by its `key_id`
Labels = tuple[str, ...]  # of a group, in the order of what it is grouped by

_COLUMNS: dict[By, str] = {
    "day": "strftime('%Y-%m-%d', since / 1000, 'unixepoch')",
    "hour": "strftime('%Y-%m-%dT%H:00:00Z', since / 1000, 'unixepoch')",
    "account": "coalesce((SELECT account_id FROM keys WHERE id = key_id), '')",
    "key": "key_id",
    "model": "model",
    "node": "node_id",
    "peer": "node_id",  # the box that served it, which may be this one
}
_ROWS: dict[Level, str] = {
    "key": "key_id IN (SELECT id FROM keys)",
    "account": "key_id IN (SELECT id FROM accounts)",
    "box": "key_id = ''",
}


class UsageFilter(msgspec.Struct, frozen=True):
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
    database: Database, wanted: UsageFilter, by: tuple[By, ...], only: list[str] | None = None
) -> dict[Labels, Sums]:
    """By group, in the order of their labels; of the keys (by account: of the accounts) `only`, if
    they are given."""
    used = await database.scan(*summed("usage", wanted, by, only))
    waited: list[Row] = []
    if "hour" not in by:  # they are kept by day
        waited = await database.scan(*summed("latencies", wanted, by, only))
    errors: list[Row] = []
    if not {"node", "peer"} & set(by):  # nobody has served what was refused
        errors = await database.scan(*summed("refusals", wanted, by, only))
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


async def busiest(database: Database, wanted: UsageFilter, who: Who, limit: int) -> list[str]:
    """Keys or accounts ('' for requests that had none), those that used most first."""
    return [row[0] for row in await database.scan(*ranked(wanted, who, limit))]


def ranked(wanted: UsageFilter, who: Who, limit: int) -> Statement:
    """The statement that finds them."""
    level: Level = "key" if wanted.key_id is not None else who
    used, refused = _conditions("usage", wanted, level), _conditions("refusals", wanted, "key")
    return (
        f"SELECT who FROM (SELECT {_label(who, level)} AS who,"
        f" prompt_tokens + completion_tokens AS tokens FROM usage{_where(used)}"
        f" UNION ALL SELECT {_label(who, 'key')}, 0 FROM refusals{_where(refused)})"
        " GROUP BY who ORDER BY sum(tokens) DESC, who LIMIT ?",
        (*_values(used), *_values(refused), limit),
    )


_TOTALS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "amount")


_TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # what is summed, and by what else
    "usage": (_TOTALS, ()),
    "latencies": (("count",), ("kind", "ms")),
    "refusals": (("count",), ("code",)),
}


def summed(
    table: str, wanted: UsageFilter, by: tuple[By, ...], only: list[str] | None
) -> Statement:
    """The statement that sums a table."""
    totals, also = _TABLES[table]
    level = _level(table, wanted, by)
    columns = [f"{_label(one, level)} AS by_{one}" for one in by]
    groups = ", ".join([*(f"by_{one}" for one in by), *also])
    selected = ", ".join([*columns, *also, *(f"sum({name}) AS {name}" for name in totals)])
    conditions = _conditions(table, wanted, level)
    if only is not None:
        name = _label("key" if "key" in by else "account", level)
        encoded = msgspec.json.encode(only).decode()
        conditions = [(f"{name} IN (SELECT value FROM json_each(?))", (encoded,)), *conditions]
    grouped = f" GROUP BY {groups}" if groups else ""
    having = "" if groups else " HAVING count(*) > 0"  # sums of nothing are no row
    sql = f"SELECT {selected} FROM {table}{_where(conditions)}{grouped}{having}"
    return sql, _values(conditions)


def _level(table: str, wanted: UsageFilter, by: tuple[By, ...]) -> Level:
    """The rows that tell apart what is asked for, and no more of them than that needs."""
    if table == "refusals" or "key" in by or wanted.key_id is not None:
        return "key"
    return "account" if "account" in by or wanted.account_id is not None else "box"


def _label(by: By, level: Level) -> str:
    return "key_id" if by == level else _COLUMNS[by]


_Condition = tuple[str, tuple[Any, ...]]  # with its values


def _conditions(table: str, wanted: UsageFilter, level: Level) -> list[_Condition]:
    """Of the rows of one level: each request is in the sums of its key, of its account and of the
    box, and whoever added these up would count it three times."""
    found: list[_Condition] = []
    if wanted.account_id is not None and level == "key":
        whose = "key_id IN (SELECT id FROM keys WHERE account_id = ?)"
        found.append((whose, (wanted.account_id,)))
    elif wanted.account_id is not None:
        found.append(("key_id = ?", (wanted.account_id,)))
    elif table != "refusals" or wanted.key_id is not None:  # there, '' is who had no key
        found.append((_ROWS[level], ()))
    for text, value in (
        ("key_id = ?", wanted.key_id),
        ("model = ?", wanted.model),
        ("since >= ?", wanted.since),
        ("since < ?", wanted.until),
    ):
        if value is not None:
            found.append((text, (value,)))
    return found


def _where(conditions: list[_Condition]) -> str:
    text = " AND ".join(condition for condition, _ in conditions)
    return f" WHERE {text}" if text else ""


def _values(conditions: list[_Condition]) -> tuple[Any, ...]:
    return tuple(value for _, values in conditions for value in values)

"""Usage by groups: sums, latencies and errors, from the sums of hours and days in the database."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Literal

import msgspec

from pinaivu_box.store.database import Database, Row, SqlStatement

By = Literal["day", "hour", "account", "key", "model", "node", "peer"]
BYS: tuple[By, ...] = ("day", "hour", "account", "key", "model", "node", "peer")
Who = Literal["account", "key"]
Level = Literal["account", "key", "box"]  # whose sums a row holds, by its `key_id`
_DAY_MS = 86_400_000
LATENCIES_BY_HOUR_KEPT_MS = 7 * _DAY_MS
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
    """Which usage is wanted; None is all.  `since` and `until`, which is excluded, are Unix
    milliseconds; a day that was rolled up counts as its first hour."""

    account_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    since: int | None = None
    until: int | None = None


class Sums(msgspec.Struct):
    """The sums of a group.  `amount` in 10^-9 of the currency; `ttft_ms` and `total_ms` count the
    requests that took at most that many milliseconds, `errors` the errors by code."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    amount: int = 0
    ttft_ms: Counter[int] = msgspec.field(default_factory=Counter)
    total_ms: Counter[int] = msgspec.field(default_factory=Counter)
    errors: Counter[str] = msgspec.field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def add(self, other: Sums) -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


async def usage(
    database: Database,
    selection: UsageFilter,
    by: tuple[By, ...],
    only: list[str] | None = None,
    *,
    with_latencies: bool = True,
) -> dict[Labels, Sums]:
    """The sums of each group, in the order of their labels; with `only`, of these keys, or of these
    accounts if it is grouped by account and not by key."""
    usage_rows = await database.scan(*summed("usage", selection, by, only))
    latencies: list[Row] = []
    if with_latencies and "hour" not in by:  # they are kept by day
        latencies = await database.scan(*summed("latencies", selection, by, only))
    errors: list[Row] = []
    if not {"node", "peer"} & set(by):  # no box has served a refused request
        errors = await database.scan(*summed("refusals", selection, by, only))
    # In a thread: with a hundred thousand rows, streams would stall.
    return await asyncio.to_thread(_groups, usage_rows, latencies, errors, len(by))


def _groups(
    usage_rows: list[Row], latencies: list[Row], errors: list[Row], labels: int
) -> dict[Labels, Sums]:
    groups: dict[Labels, Sums] = {}

    def group(row: Row) -> Sums:
        return groups.setdefault(tuple(row[:labels]), Sums())

    for row in usage_rows:
        total = group(row)
        for name in _TOTALS:
            setattr(total, name, row[name])
    for row in latencies:
        getattr(group(row), f"{row['kind']}_ms")[row["ms"]] += row["count"]
    for row in errors:
        group(row).errors[row["code"]] += row["count"]
    return dict(sorted(groups.items()))


async def latencies_by_hour(database: Database, since: int, until: int) -> dict[int, Sums]:
    """Of the whole box, by the hour's beginning: the times of requests, and nothing else.
    Retention keeps them for LATENCIES_BY_HOUR_KEPT_MS."""
    rows = await database.scan(
        "SELECT since, kind, ms, count FROM latencies_by_hour WHERE since >= ? AND since < ?",
        (since, until),
    )
    return _timed(rows)


async def latencies_by_day(database: Database, selection: UsageFilter) -> dict[int, Sums]:
    """The same by the day's beginning."""
    where, values = _where(_conditions("latencies", selection, _level("latencies", selection, ())))
    rows = await database.scan(
        f"SELECT since, kind, ms, sum(count) AS count FROM latencies{where}"
        " GROUP BY since, kind, ms",
        values,
    )
    return _timed(rows)


async def latencies_of(
    database: Database, selection: UsageFilter, by: By, ids: list[str]
) -> dict[str, Sums]:
    """The times of the requests of these keys, accounts, models or nodes, and nothing else.  They
    are those of whole days, from the one in which `selection.since` is."""
    since = selection.since
    if since is not None:
        selection = msgspec.structs.replace(selection, since=since - since % _DAY_MS)
    level = _level("latencies", selection, (by,))
    label = _label(by, level)
    if by == "key":  # those of an account are its keys: to look for them would read all of them
        selection = msgspec.structs.replace(selection, account_id=None)
    encoded = msgspec.json.encode(ids).decode()
    among = (f"{label} IN (SELECT value FROM json_each(?))", (encoded,))
    where, values = _where([among, *_conditions("latencies", selection, level)])
    rows = await database.scan(
        f"SELECT {label} AS who, kind, ms, sum(count) AS count FROM latencies{where}"
        " GROUP BY who, kind, ms",
        values,
    )
    return _timed(rows)


def _timed(rows: list[Row]) -> dict[Any, Sums]:
    """The times in rows of (group, kind, ms, count), by group."""
    groups: dict[Any, Sums] = {}
    for group, kind, ms, count in rows:
        getattr(groups.setdefault(group, Sums()), f"{kind}_ms")[ms] += count
    return groups


async def busiest(database: Database, selection: UsageFilter, kind: Who, limit: int) -> list[str]:
    """The ids of the keys or accounts with the most tokens, '' for requests without a key."""
    return [row[0] for row in await database.scan(*ranked(selection, kind, limit))]


async def biggest(
    database: Database, selection: UsageFilter, kind: Who, limit: int
) -> list[tuple[str, Sums]]:
    """The ids of the keys or accounts with the most tokens and their sums, without latencies, the
    most first; '' for requests without a key."""
    level: Level = "key" if selection.key_id is not None else kind
    where, values = _where(_conditions("usage", selection, level))
    refused, refused_values = _where(_conditions("refusals", selection, "key"))
    sums = ", ".join(f"sum({name}) AS {name}" for name in _TOTALS)
    rows = await database.scan(
        f"SELECT {_label(kind, level)} AS who, {sums} FROM usage{where} GROUP BY who"
        " ORDER BY sum(prompt_tokens) + sum(completion_tokens) DESC, who LIMIT ?",
        (*values, limit),
    )
    errors = await database.scan(
        f"SELECT {_label(kind, 'key')} AS who, code, sum(count) AS count FROM refusals{refused}"
        " GROUP BY who, code ORDER BY count DESC",
        refused_values,
    )
    found = {row["who"]: Sums(**{name: row[name] for name in _TOTALS}) for row in rows}
    for row in errors:
        if len(found) < limit:
            found.setdefault(row["who"], Sums())
        if row["who"] in found:
            found[row["who"]].errors[row["code"]] += row["count"]
    return list(found.items())


def ranked(selection: UsageFilter, kind: Who, limit: int) -> SqlStatement:
    """The statement of `busiest`."""
    level: Level = "key" if selection.key_id is not None else kind
    used, used_values = _where(_conditions("usage", selection, level))
    refused, refused_values = _where(_conditions("refusals", selection, "key"))
    return (
        f"SELECT who FROM (SELECT {_label(kind, level)} AS who,"
        f" prompt_tokens + completion_tokens AS tokens FROM usage{used}"
        f" UNION ALL SELECT {_label(kind, 'key')}, 0 FROM refusals{refused})"
        " GROUP BY who ORDER BY sum(tokens) DESC, who LIMIT ?",
        (*used_values, *refused_values, limit),
    )


async def names_of(database: Database, kind: Who, ids: set[str]) -> dict[str, str]:
    """The names of keys or accounts, also of revoked and removed ones."""
    name = "coalesce(nullif(name, ''), prefix || '...' || last_four)" if kind == "key" else "name"
    rows = await database.scan(
        f"SELECT id, {name} FROM {kind}s WHERE id IN (SELECT value FROM json_each(?))",
        (msgspec.json.encode(sorted(ids)).decode(),),
    )
    return {row[0]: row[1] for row in rows}


_TOTALS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "amount")
# The columns to sum, and those to group by as well.
_TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "usage": (_TOTALS, ()),
    "latencies": (("count",), ("kind", "ms")),
    "refusals": (("count",), ("code",)),
}


def summed(
    table: str, selection: UsageFilter, by: tuple[By, ...], only: list[str] | None
) -> SqlStatement:
    """The statement that sums a table by group."""
    totals, fixed = _TABLES[table]
    level = _level(table, selection, by)
    columns = [f"{_label(group, level)} AS by_{group}" for group in by]
    groups = ", ".join([*(f"by_{group}" for group in by), *fixed])
    selected = ", ".join([*columns, *fixed, *(f"sum({name}) AS {name}" for name in totals)])
    conditions = _conditions(table, selection, level)
    if only is not None:
        name = _label("key" if "key" in by else "account", level)
        encoded = msgspec.json.encode(only).decode()
        conditions = [(f"{name} IN (SELECT value FROM json_each(?))", (encoded,)), *conditions]
    # Without HAVING, no rows would give one row.
    grouped = f" GROUP BY {groups}" if groups else " HAVING count(*) > 0"
    where, values = _where(conditions)
    return f"SELECT {selected} FROM {table}{where}{grouped}", values


def _level(table: str, selection: UsageFilter, by: tuple[By, ...]) -> Level:
    """The coarsest level whose rows tell apart what is asked for."""
    if table == "refusals" or "key" in by or selection.key_id is not None:
        return "key"
    return "account" if "account" in by or selection.account_id is not None else "box"


def _label(by: By, level: Level) -> str:
    return "key_id" if by == level else _COLUMNS[by]


_Condition = tuple[str, tuple[Any, ...]]  # with its values


def _conditions(table: str, selection: UsageFilter, level: Level) -> list[_Condition]:
    """The conditions for the rows of one level: each request is in the sums of its key, of its
    account and of the box, so a report that reads several levels would count it several times."""
    conditions: list[_Condition] = []
    if selection.account_id is not None and level == "key":
        of_account = "key_id IN (SELECT id FROM keys WHERE account_id = ?)"
        conditions.append((of_account, (selection.account_id,)))
    elif selection.account_id is not None:
        conditions.append(("key_id = ?", (selection.account_id,)))
    elif table != "refusals" or selection.key_id is not None:  # in which '' stands for no key
        conditions.append((_ROWS[level], ()))
    for text, value in (
        ("key_id = ?", selection.key_id),
        ("model = ?", selection.model),
        ("since >= ?", selection.since),
        ("since < ?", selection.until),
    ):
        if value is not None:
            conditions.append((text, (value,)))
    return conditions


def _where(conditions: list[_Condition]) -> _Condition:
    """The clause of all conditions."""
    text = " AND ".join(condition for condition, _ in conditions)
    values = tuple(value for _, values in conditions for value in values)
    return f" WHERE {text}" if text else "", values

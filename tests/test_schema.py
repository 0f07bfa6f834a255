"""What the schema promises: sums that its triggers keep, and that nothing big is scanned."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.receipt_log import adoption, examine
from pinaivu_box.store import audit, keys, log, requests, responses, retention
from pinaivu_box.store.database import Database, Row

pytestmark = pytest.mark.anyio
MONDAY = 1_735_516_800_000  # 2024-12-30T00:00:00Z
BIG = (
    "keys", "accounts", "audit", "requests", "receipts", "responses", "usage", "latencies",
    "refusals", "log_entries", "log_tiles", "log_checkpoints", "log_removals",
)  # fmt: skip


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# -- periods of budgets, sums of responses ------------------------------------------------


async def test_a_period_of_a_budget_is_taken_up_again(tmp_path: Path) -> None:
    """A clock that was ahead finds again what was spent in the period that it comes back to."""
    day = 86_400_000
    policy = '{"budget":{"amount":"10","period":"30d"}}'
    async with Database(tmp_path / "box.db") as database:
        await database.write(
            (
                "INSERT INTO keys (id, account_id, hash, prefix, last_four, name, policy,"
                " created_at, spent, spent_since)"
                " VALUES ('key_a', 'acct_owner', x'00', '', '', '', ?, ?, 7, ?)",
                (policy, MONDAY, MONDAY + 390 * day),
            )
        )
        key = await keys.get(database, "key_a")
        budget = key.policy.budget
        assert budget is not None
        for at, spent in ((MONDAY + day, 0), (MONDAY + 391 * day, 7)):
            assert key.spent_in(*budget.window(key.created_at, at)) == spent
        for period, amount in ((MONDAY, 2), (MONDAY + 390 * day, 1), (MONDAY, 3)):
            await database.write(
                keys.charge("key_a", tokens=1, amount=amount, at=MONDAY, period=period)
            )
        key = await keys.get(database, "key_a")
        assert key.periods == {MONDAY: 5, MONDAY + 390 * day: 8}


async def test_responses_of_a_key_are_counted_whatever_becomes_of_them(tmp_path: Path) -> None:
    async with Database(tmp_path / "box.db") as database:
        rows = {
            "a": (b'{"status":"incomplete"}', "incomplete"),
            "b": (b"no JSON", "completed"),
            "c": (b'{"status":"queued"}', "queued"),
        }
        for name, (body, status) in rows.items():
            response = responses.StoredResponse(
                name, "acct_owner", None, 1, b"[]", body, "key_a", status
            )
            await responses.insert(database, response, max_count=9, max_bytes=10**9)
        await responses.fail_unfinished(database)
        found = await database.read("SELECT id, status, body FROM responses")
        ended = {row["id"]: (row["body"], row["status"]) for row in found}
        assert ended.pop("c")[1] == "failed"
        assert ended == {name: rows[name] for name in "ab"}
        one = await responses.find(database, "a", "acct_owner")
        assert one is not None
        for events, most in ((b"e" * 99, 3), (b"e", 1)):
            await responses.finish(database, one, events, max_count=most, max_bytes=10**9)
            (row,) = await database.read("SELECT * FROM response_sums")
            sums = await database.read("SELECT count(*), sum(bytes) FROM responses")
            assert tuple(row) == ("key_a", *tuple(sums[0])) and row["count"] == most


async def test_only_the_latest_periods_are_remembered(tmp_path: Path) -> None:
    async with Database(tmp_path / "box.db") as database:
        await database.write(
            (
                "INSERT INTO keys (id, account_id, hash, prefix, last_four, name, policy,"
                " created_at) VALUES ('key_a', 'acct_owner', x'00', '', '', '', '{}', 0)",
                (),
            )
        )
        for period in range(1, 100):
            await database.write(keys.charge("key_a", tokens=1, amount=period, at=0, period=period))
        key = await keys.get(database, "key_a")
        assert key.periods == {n: n for n in range(99 - keys.MAX_PERIODS, 100)}


# -- query plans -----------------------------------------------------------------------------------


def audit_of(column: str) -> str:
    only: dict[str, Any] = {"targets": None, "actors": None, f"{column}s": ["key_1"]}
    dates: dict[str, Any] = {"since": 0, "until": None, "after": 9, "action": None}
    return audit.listing(**only, **dates, limit=9)[0]


PLANNED = {
    "key by secret": keys.FIND,
    "newest keys": keys.LS,
    "newest keys of an account": keys.LS_OF_ACCOUNT,
    "last minute of a key": requests.SINCE,
    "audit trail of an erased account": audit.forget_names("acct_1", "ada")[0][0],
    **{f"audit trail of one {column}": audit_of(column) for column in ("target", "actor")},
    **{f"old {table}": statement for table, statement in retention.OLD_ROWS.items()},
    "entries of the log": " UNION ALL ".join([log.ENTRIES] * 3),
    "tiles of the log": " UNION ALL ".join([log.TILE] * 3),
    "last tile of a level": log.LAST_TILE,
    "newest checkpoint": log.CHECKPOINT,
    "checkpoint that covers an entry": log.CHECKPOINT_OVER,
    "last record of removals": log.LAST_REMOVAL,
    "receipts without entry": adoption.NEXT,
    "tail of the log": examine.ROWS,
    "responses that ran": responses.FAIL_UNFINISHED,
    **dict(zip(("receipts anew", "responses anew"), retention.NEW_DATES, strict=True)),
    "hours of usage": retention.HOURS,
    "hours of refusals": retention.HOURS_OF_REFUSALS,
    "days": retention.DAYS,
    "pages of keys and accounts": retention.OWNERS,
    **{
        f"receipts of {account} {key} {model}": requests.listing(account, key, model, "req_1", 9)[0]
        for account in (None, "acct_1")
        for key in (None, "key_1")
        for model in (None, "a:1")
    },
}


async def plan(database: Database, statement: str) -> list[str]:
    numbered = [int(number) for number in re.findall(r"\?(\d)", statement)]
    values = [1] * (max(numbered) if numbered else statement.count("?"))
    return [row["detail"] for row in await database.read(f"EXPLAIN QUERY PLAN {statement}", values)]


def check_plan(steps: list[str]) -> None:
    """Every big table is searched by an index, and nothing that it finds is sorted."""
    touched = [step for step in steps if any(f" {table}" in step for table in BIG)]
    assert touched and all(step.startswith("SEARCH ") for step in touched), steps
    assert all(re.search("USING .*(INDEX|PRIMARY KEY)", step) for step in touched), steps
    assert not any("ORDER BY" in step for step in steps), steps


@pytest.mark.parametrize("statement", PLANNED.values(), ids=PLANNED)
async def test_nothing_big_is_scanned(tmp_path: Path, statement: str) -> None:
    async with Database(tmp_path / "box.db") as database:
        check_plan(await plan(database, statement))


async def test_rollups_find_rows_by_the_whole_primary_key(tmp_path: Path) -> None:
    async with Database(tmp_path / "box.db") as database:
        for statement in (retention.HOURS, retention.HOURS_OF_REFUSALS):
            (first, *_) = await plan(database, statement)
            assert first.count("=?") >= 4, first


async def test_a_receipt_is_found_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Database(tmp_path / "box.db") as database:
        seen: list[str] = []
        read = Database.read

        async def noted(self: Database, sql: str, parameters: Iterable[Any] = ()) -> list[Row]:
            seen.append(sql)
            return await read(self, sql, parameters)

        monkeypatch.setattr(Database, "read", noted)
        assert await requests.find_receipt(database, "req_1", account_id="acct_owner") is None
        monkeypatch.undo()
        (statement,) = seen
        check_plan(await plan(database, statement))


@pytest.mark.parametrize("whose", ["''", "?", "(SELECT id FROM keys WHERE account_id = ?)"])
@pytest.mark.parametrize("table", ["usage", "latencies"])
async def test_sums_of_a_range_of_time_read_no_more_than_that(
    tmp_path: Path, table: str, whose: str
) -> None:
    """Of the box, of a key, of an account."""
    statement = (
        f"SELECT model, count(*) FROM {table}"
        f" WHERE key_id {'IN' if 'FROM' in whose else '='} {whose} AND since >= ? AND since < ?"
        " GROUP BY model"
    )
    async with Database(tmp_path / "box.db") as database:
        steps = await plan(database, statement)
        check_plan(steps)
        assert any("(key_id=? AND since>? AND since<?)" in step for step in steps)

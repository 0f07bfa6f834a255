"""What the schema promises: a file of the release before keeps all, and nothing big is scanned."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.policy import SCOPES
from pinaivu_box.store import keys, peers, requests, responses, retention
from pinaivu_box.store.database import Database, Row
from pinaivu_box.store.migrations import APPLICATION_ID, MIGRATIONS

pytestmark = pytest.mark.anyio
HOUR = 3_600_000
MONDAY = 1_735_516_800_000  # 2024-12-30T00:00:00Z
BIG = ("keys", "accounts", "requests", "receipts", "responses", "usage", "latencies", "refusals")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# -- from schema 2 ---------------------------------------------------------------------------------


def file_of_schema_2(path: Path) -> list[tuple[str, int, str, str, int, int, int, int]]:
    """An admin's key and two others, with requests, receipts and responses of each.

    Returns what was asked: key, when, model, node, prompt, cached, completion, amount.
    """
    made = sqlite3.connect(path, isolation_level=None)
    for statement in (one for step in MIGRATIONS[:2] for one in step):
        made.execute(statement)
    made.execute("PRAGMA user_version = 2")
    made.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    for name, admin in (("key_admin", 1), ("key_a", 0), ("key_b", 0)):
        key = (name, keys.hash_of(name), "sk-pnv-abcdef", "wxyz", f"of {name}", admin, 5, None)
        made.execute(f"INSERT INTO keys VALUES ({marks(13)})", (*key, None, 77, 90, 1234, 10**10))
    asked = []
    for number in range(300):
        name = ("key_admin", "key_a", "key_b")[number % 3]
        row = (name, MONDAY + number * HOUR // 2, f"m:{number % 2}", f"node_{number % 5 // 4}")
        used = (number, number // 2, 3 * number, 10**9 + number)
        timed = (None, None if number % 7 == 0 else number, 10 * number)
        made.execute(
            f"INSERT INTO requests VALUES ({marks(13)})",
            (f"req_{number}", *row, "stop", *used, *timed),
        )
        receipt = (f"req_{number}", b"signed %d" % number, b"by", b"{}")
        made.execute(f"INSERT INTO receipts VALUES ({marks(4)})", receipt)
        previous = f"resp_{number - 3}" if number > 3 else None
        answer = (f"resp_{number}", name, previous, row[1], b"[]", b'{"output": []}')
        made.execute(f"INSERT INTO responses VALUES ({marks(6)})", answer)
        asked.append((*row, *used))
    made.close()
    return asked


def marks(number: int) -> str:
    return ", ".join("?" * number)


async def test_a_file_of_schema_2_keeps_all_and_its_usage_is_summed(tmp_path: Path) -> None:
    path = tmp_path / "box.db"
    asked = file_of_schema_2(path)
    async with Database(path) as database:
        for whose in ("", "key_admin", "key_a", "key_b"):
            mine = [row for row in asked if whose in ("", row[0])]
            rows = await database.read(
                "SELECT since, model, node_id, requests, prompt_tokens, cached_tokens,"
                " completion_tokens, amount FROM usage WHERE key_id = ?",
                (whose,),
            )
            expected: dict[tuple[int, str, str], list[int]] = {}
            for _, at, model, node, *used in mine:
                one = expected.setdefault((at - at % HOUR, model, node), [0] * 5)
                one[:] = [old + new for old, new in zip(one, [1, *used], strict=True)]
            assert {tuple(row)[:3]: list(row)[3:] for row in rows} == expected
            counts = await database.read(
                "SELECT kind, sum(count) FROM latencies WHERE key_id = ? GROUP BY kind", (whose,)
            )
            timed = sum(number % 7 != 0 for number in range(300) if asked[number] in mine)
            assert {row[0]: row[1] for row in counts} == {"total": len(mine), "ttft": timed}
        assert len(await database.read("SELECT * FROM requests")) == 300
        assert await database.read("PRAGMA foreign_key_check") == []
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_keys_of_schema_2_work_as_before_and_see_no_more(tmp_path: Path) -> None:
    """An admin's see all, for the others receipts and responses of others do not exist."""
    path = tmp_path / "box.db"
    asked = file_of_schema_2(path)
    async with Database(path) as database:
        found = {}
        for name in ("key_admin", "key_a", "key_b"):
            one = await keys.find(database, name)
            assert one is not None and not one[1]
            key = found[name] = one[0]
            assert (key.name, key.created_at, key.last_used_at) == (f"of {name}", 5, 77)
            assert (key.requests, key.tokens, key.amount) == (90, 1234, 10**10)
            assert (key.prefix, key.last_four) == ("sk-pnv-abcdef", "wxyz")
        assert found["key_admin"].policy.scopes == SCOPES
        assert not found["key_a"].admin and "inference" in found["key_a"].policy.scopes
        assert len({key.account_id for key in found.values()}) == 3
        for number, row in enumerate(asked):
            for name, key in found.items():
                mine = row[0] == name
                receipt = await requests.find_receipt(
                    database, f"req_{number}", account_id=key.account_id
                )
                assert (receipt is not None and receipt.signed == b"signed %d" % number) == mine
                answer = await responses.find(database, f"resp_{number}", key.account_id)
                assert (answer is not None) == mine
            assert await requests.find_receipt(database, f"req_{number}", account_id=None)


async def test_receipts_of_schema_2_are_listed_by_account_and_model(tmp_path: Path) -> None:
    path = tmp_path / "box.db"
    asked = file_of_schema_2(path)
    async with Database(path) as database:
        one = await keys.get(database, "key_a")
        mine = [f"req_{number}" for number, row in enumerate(asked) if row[0] == "key_a"]
        found = await database.read(*requests.listing(one.account_id, None, None, None, 1000))
        assert len(found) == len(mine) and {row["key_id"] for row in found} == {"key_a"}
        of_model = [row for row in asked if (row[0], row[2]) == ("key_a", "m:1")]
        found = await database.read(*requests.listing(one.account_id, None, "m:1", None, 1000))
        assert len(found) == len(of_model)


# -- from schema 3 ---------------------------------------------------------------------------------


async def test_a_budget_that_a_clock_has_frozen_goes_on(tmp_path: Path) -> None:
    """Its period was one of the future, and the present one could not begin before that."""
    path, day = tmp_path / "box.db", 86_400_000
    made = sqlite3.connect(path, isolation_level=None)
    for statement in (one for step in MIGRATIONS[:3] for one in step):
        made.execute(statement)
    made.execute("PRAGMA user_version = 3")
    made.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    policy = '{"budget":{"amount":"10","period":"30d"}}'
    made.execute(
        "INSERT INTO keys (id, account_id, hash, prefix, last_four, name, policy, created_at,"
        " spent, spent_since) VALUES ('key_a', 'acct_owner', x'00', '', '', '', ?, ?, 7, ?)",
        (policy, MONDAY, MONDAY + 390 * day),
    )
    for name, at in (("before", MONDAY), ("after", MONDAY + 2)):
        made.execute("INSERT INTO tickets VALUES (?, NULL, ?, 9, 1, 0)", (name, at))
    made.execute("INSERT INTO roster VALUES (x'01', 'revocation', x'', x'', ?)", (MONDAY + 1,))
    made.close()
    async with Database(path) as database:
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
        assert [one.newest for name in ("before", "after")
                if (one := await peers.ticket(database, name))] == [False, True]  # fmt: skip


# -- from schema 4 ---------------------------------------------------------------------------------


async def test_responses_of_schema_4_have_ended_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "box.db"
    made = sqlite3.connect(path, isolation_level=None)
    for statement in (one for step in MIGRATIONS[:4] for one in step):
        made.execute(statement)
    made.execute("PRAGMA user_version = 4")
    made.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    bodies = {"a": b'{"status":"incomplete"}', "b": b'{"status":"completed"}', "c": b"no JSON"}
    for name, body in bodies.items():
        made.execute(
            "INSERT INTO responses (id, account_id, created_at, input, body, stored_by)"
            " VALUES (?, 'acct_owner', 1, x'5b5d', ?, 'key_a')",
            (name, body),
        )
    made.close()
    async with Database(path) as database:
        await responses.fail_unfinished(database)
        kept = await database.read("SELECT id, status, body, bytes, events FROM responses")
        assert {row["id"]: (row["body"], row["status"]) for row in kept} == {
            "a": (bodies["a"], "incomplete"),
            "b": (bodies["b"], "completed"),
            "c": (bodies["c"], "completed"),
        }
        size = sum(len(body) + 2 for body in bodies.values())
        assert sum(row["bytes"] for row in kept) == size
        one = await responses.find(database, "a", "acct_owner")
        assert one is not None
        for events, most in ((b"e" * 99, 3), (b"e", 1)):
            await responses.finish(database, one, events, most=most, most_bytes=10**9)
            (row,) = await database.read("SELECT * FROM response_sums")
            found = await database.read("SELECT count(*), sum(bytes) FROM responses")
            assert tuple(row) == ("key_a", *tuple(found[0])) and row["count"] == most


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
        assert key.periods == {n: n for n in range(99 - keys.MOST_PERIODS, 100)}


# -- query plans -----------------------------------------------------------------------------------

PLANNED = {
    "key by secret": keys.FIND,
    "newest keys": keys.LS,
    "newest keys of an account": keys.LS_OF_ACCOUNT,
    "last minute of a key": requests.SINCE,
    **{f"old {table}": statement for table, statement in retention.OLD_ROWS.items()},
    "responses that ran": responses.FAIL_UNFINISHED,
    **dict(zip(("receipts anew", "responses anew"), retention.DATED_ANEW, strict=True)),
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


async def test_what_is_deleted_is_found_by_its_whole_key(tmp_path: Path) -> None:
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

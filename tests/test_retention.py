"""What is old goes, in small bites, and no sum changes by it."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.config import RetentionConfig
from pinaivu_box.store import retention
from pinaivu_box.store.database import Database
from tests.support.process_box import Box, wait_until
from tests.support.unlogged import unlogged

ROOT = Path(__file__).parent.parent
HOUR, DAY = 3_600_000, 86_400_000
MONDAY = 1_735_516_800_000  # 2024-12-30T00:00:00Z
KEYS, MODELS, NODES, CODES = ("key_a", "key_b", "key_c"), ("m:1", "m:2"), ("node_1", "node_2"), "xy"
# What rolling up may not change: the sums of each day.
SUMS = {
    "usage": "key_id, {day}, model, node_id, sum(requests), sum(prompt_tokens),"
    " sum(cached_tokens), sum(completion_tokens), sum(amount)",
    "latencies": "key_id, {day}, model, node_id, kind, ms, sum(count)",
    "refusals": "key_id, {day}, model, code, sum(count)",
}
GROUPS = {"usage": 4, "latencies": 6, "refusals": 4}


def rows_of(database: sqlite3.Connection, table: str) -> list[Any]:
    return sorted(database.execute(f"SELECT * FROM {table}"))


def sums(database: sqlite3.Connection) -> dict[str, list[Any]]:
    return {
        table: sorted(
            database.execute(
                f"SELECT {columns.format(day=f'since - since % {DAY}')} FROM {table}"
                f" GROUP BY {', '.join(str(n + 1) for n in range(GROUPS[table]))}"
            )
        )
        for table, columns in SUMS.items()
    }


def hours_before(database: sqlite3.Connection, moment: int) -> int:
    """How many rows of days that have ended by then are not their day's."""
    (found,) = database.execute(
        " UNION ALL ".join(
            f"SELECT since FROM {table} WHERE since < {moment - moment % DAY} AND since % {DAY}"
            for table in SUMS
        ).join(("SELECT count(*) FROM (", ")"))
    )
    return int(found[0])


def new_database(path: Path, names: tuple[str, ...] = KEYS) -> None:
    async def make() -> None:
        async with Database(path) as database:
            await database.write(
                *(
                    (
                        "INSERT INTO keys (id, account_id, hash, prefix, last_four, name, policy,"
                        " created_at) VALUES (?, 'acct_owner', ?, '', '', '', '{}', 0)",
                        (name, name.encode()),
                    )
                    for name in names
                )
            )

    asyncio.run(make())


def insert(database: sqlite3.Connection, table: str, **row: Any) -> None:
    marks = ", ".join("?" * len(row))
    database.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", [*row.values()])


def insert_request(database: sqlite3.Connection, name: str, at: int, **more: Any) -> None:
    row = {
        "request_id": name, "key_id": KEYS[0], "created_at": at, "model": MODELS[0],
        "node_id": NODES[0], "finish_reason": "stop", "prompt_tokens": 5, "cached_tokens": 2,
        "completion_tokens": 7, "amount": 11, "queue_ms": 0, "ttft_ms": 12, "total_ms": 34, **more,
    }  # fmt: skip
    insert(database, "requests", **row)


def insert_receipt(database: sqlite3.Connection, name: str, at: int, key: str = KEYS[0]) -> None:
    row = {"signed": b"{}", "signature": b"", "opening": b"{}"}
    insert(database, "receipts", request_id=name, key_id=key, created_at=at, **row)


def insert_response(database: sqlite3.Connection, name: str, at: int) -> None:
    row = {"account_id": "acct_owner", "created_at": at, "input": b"[]", "body": b"{}"}
    insert(database, "responses", id=name, **row)


def apply(path: Path, now: int, **policy: str) -> None:
    async def run() -> None:
        async with Database(path) as database:
            kept: dict[str, Any] = {"requests": "-1", "receipts": "-1", "responses": "-1", **policy}
            await retention.apply(database, RetentionConfig(**kept), now, unlogged)

    asyncio.run(run())


# -- sums ------------------------------------------------------------------------------------------

REQUEST = st.fixed_dictionaries(
    {
        "created_at": st.integers(0, 4 * DAY)
        | st.integers(0, 4 * 24).map(lambda hour: hour * HOUR)
        | st.integers(1, 4).map(lambda day: day * DAY - 1),
        "key_id": st.sampled_from(KEYS),
        "model": st.sampled_from(MODELS),
        "node_id": st.sampled_from(NODES),
        "prompt_tokens": st.integers(0, 10**6),
        "cached_tokens": st.integers(0, 10**6),
        "completion_tokens": st.integers(0, 10**6),
        "amount": st.integers(0, 10**15),
        "ttft_ms": st.none() | st.integers(0, 10**8),
        "total_ms": st.integers(0, 10**8),
    }
)
REFUSAL = st.tuples(
    st.sampled_from(["", *KEYS]),
    st.integers(0, 4 * 24).map(lambda hour: MONDAY + hour * HOUR),
    st.sampled_from(["", *MODELS]),
    st.sampled_from(CODES),
)
CUT = st.integers(0, 5 * DAY) | st.integers(0, 5).map(lambda day: day * DAY)


@settings(max_examples=40)
@given(
    st.lists(REQUEST, max_size=25),
    st.lists(REQUEST, max_size=5),
    st.dictionaries(REFUSAL, st.integers(1, 1000), max_size=15),
    st.lists(
        st.integers(0, 5 * DAY) | st.integers(0, 5).map(lambda d: d * DAY), min_size=1, max_size=3
    ),
    st.integers(1, 6),
)
def test_no_sum_changes_by_rolling_up(
    before: list[dict[str, Any]],
    late: list[dict[str, Any]],
    refused: dict[tuple[str, int, str, str], int],
    cuts: list[int],
    bite: int,
) -> None:
    """At any moments, in bites of any size, also for requests that end after their day has been
    rolled up; and doing it twice is doing it once."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(retention, "MAX_ROWS", bite)
        patch.setattr(retention, "_OWNERS_PER_PAGE", 2)
        path = Path(folder) / "box.db"
        new_database(path)
        database = sqlite3.connect(path, isolation_level=None)
        for number, row in enumerate(before):
            insert_request(database, f"req_{number}", **at_monday(row))
        for (key, since, model, code), count in refused.items():
            row = {"key_id": key, "since": since, "model": model, "code": code, "count": count}
            insert(database, "refusals", **row)
        for number, cut in enumerate(cuts):
            moment = MONDAY + cut
            for more in late[number : number + 1]:
                insert_request(database, f"req_late{number}", **at_monday(more))
            expected, newer = sums(database), newer_than(database, moment)
            for _ in range(2):
                apply(path, moment + DAY, requests="1d")
                assert sums(database) == expected
                assert hours_before(database, moment) == 0
                assert newer_than(database, moment) == newer
                left = {row[2] for row in rows_of(database, "requests")}
                assert all(at >= moment for at in left)
        database.close()


def at_monday(row: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in row.items() if k != "created_at"}, "at": MONDAY + row["created_at"]}


def newer_than(database: sqlite3.Connection, moment: int) -> list[Any]:
    """What must stay as it is."""
    midnight = moment - moment % DAY
    kept = [
        [row for row in rows_of(database, table) if row[at] >= midnight]
        for table, at in (("usage", 1), ("latencies", 1), ("refusals", 1))
    ]
    return [*kept, [row for row in rows_of(database, "requests") if row[2] >= moment]]


def test_a_negative_time_is_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "box.db"
    new_database(path)
    database = sqlite3.connect(path, isolation_level=None)
    insert_request(database, "req_1", HOUR)
    insert_receipt(database, "req_1", HOUR)
    insert_response(database, "resp_1", HOUR)
    tables = ("usage", "latencies", "requests", "receipts", "responses")
    before = {table: rows_of(database, table) for table in tables}
    apply(path, MONDAY)
    assert {table: rows_of(database, table) for table in tables} == before
    apply(path, MONDAY, requests="2h", receipts="2h", responses="2h")
    assert [rows_of(database, table) for table in tables[2:]] == [[], [], []]
    assert hours_before(database, MONDAY) == 0
    database.close()


@pytest.mark.parametrize(
    ("table", "put"), [("receipts", insert_receipt), ("responses", insert_response)]
)
def test_each_table_has_a_time_of_its_own(
    tmp_path: Path, table: str, put: Callable[..., None]
) -> None:
    """Also with more rows than one bite."""
    path = tmp_path / "box.db"
    new_database(path)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("BEGIN")
    for number in range(-2 * retention.MAX_ROWS - 7, 3):
        put(database, f"row_{number}", MONDAY - 3 * HOUR + number)
    insert_request(database, "req_1", HOUR)
    database.execute("COMMIT")
    apply(path, MONDAY, **{table: "3h"})
    kept = {row[0] for row in rows_of(database, table)}
    assert kept == {"row_0", "row_1", "row_2"}
    assert len(rows_of(database, "requests")) == 1
    database.close()


# -- clocks ----------------------------------------------------------------------------------------

# Days at which retention looks at the clock, and up to when it is believed.
CLOCKS: dict[str, tuple[list[float], list[float]]] = {
    "goes on": ([0, 0.04, 0.08, 1.0, 2.0], [0, 0.04, 0.08, 1.0, 2.0]),
    "is ahead for an hour": ([0, 400, 400.04, 0.1, 0.2], [0, 0, 0, 0.1, 0.2]),
    "is ahead over a restart and back": ([0, 400, 0.5, 400, 1], [0, 0, 0.5, 0.5, 1]),
    "was right to leap": ([0, 400, 400.5, 401.1, 401.2], [0, 0, 0, 401.1, 401.2]),
    "is set back a little while it is not believed": (
        [0, 40, 40.5, 40.4, 41.4],
        [0, 0, 0, 0, 41.4],
    ),
    "leaps, and is set back a little at once": (
        [0, 400, 399.95, 400.5, 401.1],
        [0, 0, 0, 0, 401.1],
    ),
    "is behind for an hour": ([0, -400, -399.9, 0.2, 0.3], [0, -400, -399.9, -399.9, -399.9]),
    "is asked once a week": ([0, 7, 14, 21, 28], [0, 0, 7, 14, 21]),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_a_clock_is_believed_once_it_has_gone_on_for_a_day(tmp_path: Path, name: str) -> None:
    path, (looks, expected) = tmp_path / "box.db", CLOCKS[name]

    async def run() -> list[int]:
        found = []
        for day in looks:  # each after a restart
            async with Database(path) as database:
                found.append(await retention.believed(database, MONDAY + round(day * DAY)))
        return found

    assert asyncio.run(run()) == [MONDAY + round(day * DAY) for day in expected]


async def look(path: Path, now: int) -> None:
    """As a server does once an hour."""
    async with Database(path) as database:
        kept = RetentionConfig(requests="7d", receipts="7d", responses="7d")
        await retention.apply(database, kept, await retention.believed(database, now), unlogged)


def names(path: Path, table: str) -> list[str]:
    with sqlite3.connect(path) as database:
        return sorted(row[0] for row in rows_of(database, table))


def test_rows_stay_while_the_clock_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "box.db"
    new_database(path)
    with sqlite3.connect(path) as database:
        for name, at in (("a", MONDAY - 9 * DAY), ("b", MONDAY - 6 * DAY)):
            insert_request(database, name, at)
            insert_receipt(database, name, at)
            insert_response(database, name, at)
    tables = ("requests", "receipts", "responses")
    for day in (0, 400, 400.9, 0.1, 0.9):
        asyncio.run(look(path, MONDAY + round(day * DAY)))
        assert [names(path, table) for table in tables] == [["b"]] * 3, day
    asyncio.run(look(path, MONDAY + round(1.2 * DAY)))
    assert [names(path, table) for table in tables] == [[]] * 3


def test_a_clock_that_is_ahead_takes_no_times_to_the_first_token(tmp_path: Path) -> None:
    path = tmp_path / "box.db"
    new_database(path)

    def hours() -> list[int]:
        with sqlite3.connect(path) as database:
            return sorted({row[0] for row in rows_of(database, "latencies_by_hour")})

    def request(number: int) -> None:
        with sqlite3.connect(path) as database:
            insert_request(database, f"req_{number}", MONDAY + number * DAY)

    for day in range(7):
        request(day)
        asyncio.run(look(path, MONDAY + day * DAY))
    week = [MONDAY + day * DAY for day in range(7)]
    assert hours() == week
    request(371)
    asyncio.run(look(path, MONDAY + 371 * DAY))
    request(7)
    asyncio.run(look(path, MONDAY + 7 * DAY))
    assert hours() == [*week, MONDAY + 7 * DAY, MONDAY + 371 * DAY]
    asyncio.run(look(path, MONDAY + 7 * DAY + HOUR))
    assert hours() == [*week[1:], MONDAY + 7 * DAY, MONDAY + 371 * DAY]


def test_rows_dated_by_a_clock_that_was_behind_count_as_new(tmp_path: Path) -> None:
    """A machine without a battery begins in 1970, until it has asked what time it is."""
    path = tmp_path / "box.db"
    new_database(path)
    asyncio.run(look(path, MONDAY))
    many = retention.MAX_ROWS + 7
    with sqlite3.connect(path) as database:
        insert_receipt(database, "old", MONDAY - 3 * DAY + HOUR)
        insert_response(database, "old", MONDAY - 3 * DAY + HOUR)
    asyncio.run(look(path, MONDAY - 20_000 * DAY))
    with sqlite3.connect(path) as database:
        for number in range(many):
            insert_receipt(database, f"behind{number}", MONDAY - 20_000 * DAY + HOUR)
        insert_response(database, "behind", MONDAY - 20_000 * DAY + HOUR)
    for day in (1, 3, 3.9, 4.8):  # the last: 7 days after the old ones
        asyncio.run(look(path, MONDAY + round(day * DAY)))
    assert len(names(path, "receipts")) == many
    assert names(path, "responses") == ["behind"]
    for day in (5.7, 6.6, 7.5, 8.4):
        asyncio.run(look(path, MONDAY + round(day * DAY)))
    assert names(path, "receipts") == names(path, "responses") == []


def test_a_clock_that_is_set_back_by_hours_keeps_nothing_longer(tmp_path: Path) -> None:
    """Where two systems start in turn, one takes the other's local time for its own, until it has
    asked what time it is: two hours ahead each morning.  On Saturdays it is off."""
    path = tmp_path / "box.db"
    new_database(path)
    for day in (0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 14, 15):
        morning = MONDAY + day * DAY + 8 * HOUR
        for hours in (2, 1, 6) if day % 7 == 0 else (1, 6):
            asyncio.run(look(path, morning + hours * HOUR))
        if day == 1:
            with sqlite3.connect(path) as database:
                insert_receipt(database, "a", morning + 3 * HOUR)
                insert_response(database, "a", morning + 3 * HOUR)
        kept = ["a"] if 1 <= day < 8 else []
        assert names(path, "receipts") == names(path, "responses") == kept, day


def test_a_kill_in_the_middle_changes_no_sum(tmp_path: Path) -> None:
    """Killed again and again somewhere between the first bite and the last; then it ends."""
    path = tmp_path / "box.db"
    new_database(path)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("BEGIN")
    for number in range(6000):
        more = {"key_id": KEYS[number % 3], "ttft_ms": number % 700, "total_ms": number * 7 % 9000}
        insert_request(database, f"req_{number}", MONDAY + number * (DAY // 3000), **more)
    database.execute("COMMIT")
    expected, moment = sums(database), MONDAY + 30 * DAY
    code = f"""
import asyncio, pathlib
from pinaivu_box.config import RetentionConfig
from pinaivu_box.store import retention
from pinaivu_box.store.database import Database
async def main():
    async with Database(pathlib.Path({str(path)!r})) as database:
        await retention.apply(database, RetentionConfig(requests="2h"), {moment}, None)
asyncio.run(main())
"""
    hours, killed = hours_before(database, moment), 0
    for part in (0.9, 0.6, 0.3, 0.1):
        child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        while child.poll() is None and hours_before(database, moment) > part * hours:
            time.sleep(0.001)
        child.kill()
        killed += child.wait() == -signal.SIGKILL
        assert sums(database) == expected
    assert killed
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert sums(database) == expected
    assert hours_before(database, moment) == 0 == len(rows_of(database, "requests"))
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()


# -- the server ------------------------------------------------------------------------------------


def test_a_server_rolls_up_and_says_the_same(tmp_path: Path) -> None:
    """Rows of 100 days, through a real server: the same sums, and receipts by their own policy."""
    home = tmp_path / "home"
    home.mkdir()
    config = home / "config.toml"
    config.write_text('[retention]\nrequests = "-1"\n')
    box = Box(home, "--model", "fake:1=fake:0").start()
    try:
        assert box.stop() == 0
        database = sqlite3.connect(home / "pinaivu.db", isolation_level=None)
        (key,) = database.execute("SELECT id FROM keys").fetchone()
        now = time.time_ns() // 1_000_000
        database.execute("BEGIN")
        for number in range(1000):
            at = now - number * (DAY // 10) - HOUR
            insert_request(database, f"req_{number}", at, key_id=key, model=MODELS[number % 2])
            insert_receipt(database, f"req_{number}", at, key)
        database.execute("COMMIT")
        since = now - 30 * DAY
        assert hours_before(database, since) > 0
        before = reports(box.start())
        assert hours_before(database, since) > 0
        assert box.stop() == 0
        config.write_text('[retention]\nrequests = "30d"\nreceipts = "60d"\n')
        box.start()
        wait_until(lambda: hours_before(database, since) == 0, "days")
        assert reports(box) == before
        assert before["total_requests"] == 1000
        assert 295 < len(rows_of(database, "requests")) < 305
        # Within 60 days, and long after them.
        assert box.http("GET", "/v1/receipts/req_590").status_code != 404
        wait_until(lambda: box.http("GET", "/v1/receipts/req_610").status_code == 404, "receipts")
        assert 595 < len(rows_of(database, "receipts")) < 605
        database.close()
        assert "could not" not in box.errors
        assert box.stop() == 0
    finally:
        box.end()


def reports(box: Box) -> dict[str, Any]:
    made: dict[str, Any] = box.http("GET", "/v1/usage").json()
    return {**made, "request_id": ""}


def test_a_failed_retention_run_is_logged_and_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The policy is asked for each time, so that a new configuration counts."""
    monkeypatch.setattr(retention, "_INTERVAL_SECONDS", 0.001)
    path = tmp_path / "box.db"
    new_database(path)
    database = sqlite3.connect(path, isolation_level=None)
    insert_request(database, "req_1", time.time_ns() // 1_000_000 - DAY)

    async def run() -> None:
        done = asyncio.Event()

        def policies() -> Iterator[RetentionConfig]:
            yield RetentionConfig(requests="soon")
            assert "tries again" in caplog.text
            yield RetentionConfig()
            assert len(rows_of(database, "requests")) == 1
            yield RetentionConfig(requests="2h")
            done.set()
            yield RetentionConfig()

        async with Database(path) as opened:
            task = asyncio.create_task(
                retention.apply_hourly(opened, policies().__next__, unlogged)
            )
            await asyncio.wait_for(done.wait(), 60)
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(run())
    assert rows_of(database, "requests") == []
    database.close()

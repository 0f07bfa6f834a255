"""The database file: its schema, group commit, keys and money."""

from __future__ import annotations

import asyncio
import sqlite3
import string
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_box import amount
from pinaivu_box.errors import DatabaseUnusable
from pinaivu_box.policy import SCOPES, Policy
from pinaivu_box.store import database as database_module
from pinaivu_box.store import keys
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database
from pinaivu_box.store.new_keys import Draft, NewKeys
from pinaivu_box.store.schema import APPLICATION_ID, CURRENT, Schema
from tests.support.waiting import DEADLINE

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.anyio
INSERT = "INSERT INTO model_files VALUES (?, ?, ?, ?)"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def contents_of(folder: Path) -> bytes:
    """All that is stored there, whichever file SQLite keeps it in."""
    return b"".join(file.read_bytes() for file in files(folder))


# -- the schema ------------------------------------------------------------------------------------


def tables(connection: sqlite3.Connection) -> list[str]:
    rows = connection.execute(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
    )
    return sorted(name for (name,) in rows)


def columns(connection: sqlite3.Connection, table: str) -> list[tuple[str, str]]:
    return [(row[1], row[2]) for row in connection.execute(f"PRAGMA table_info({table})")]


def schema(connection: sqlite3.Connection) -> dict[str, Any]:
    """Tables with their columns, indexes and references, without the text of their SQL."""
    return {
        table: {
            kind: sorted(map(repr, connection.execute(f"PRAGMA {kind}({table})")))
            for kind in ("table_xinfo", "index_list", "foreign_key_list")
        }
        for table in tables(connection)
    }


# What columns have to hold that take not every text.
CHECKED = {("accounts", "role"): "member", ("incidents", "kind"): "engine"}


def fill(connection: sqlite3.Connection) -> dict[str, list[dict[str, Any]]]:
    """Two rows and more in every table, whatever its columns; equal texts, so that references
    hold.  What the schema itself has put there stays."""
    for table in tables(connection):
        for number in (1, 2):
            value = {"TEXT": f"row{number}", "INTEGER": number, "BLOB": b"row%d" % number}
            row = [
                CHECKED.get((table, name), value.get(kind, number))
                for name, kind in columns(connection, table)
            ]
            marks = ", ".join("?" * len(row))
            connection.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row)
    return contents(connection)


def contents(connection: sqlite3.Connection) -> dict[str, list[dict[str, Any]]]:
    return {
        table: [
            dict(zip([name for name, _ in columns(connection, table)], row, strict=True))
            for row in connection.execute(f"SELECT {_names(connection, table)} FROM {table}")
        ]
        for table in tables(connection)
    }


def _names(connection: sqlite3.Connection, table: str) -> str:
    """Without those that follow from others."""
    return ", ".join(f'"{name}"' for name, _ in columns(connection, table))


NEXT = Schema(
    CURRENT.script
    + """
    ALTER TABLE keys ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue';
    CREATE TABLE notes (key_id TEXT NOT NULL REFERENCES keys (id), text TEXT) STRICT;
    """
    + f"PRAGMA user_version = {CURRENT.version + 2};",
    CURRENT.oldest,
    (
        *CURRENT.migrations,
        ("ALTER TABLE keys ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue'",),
        ("CREATE TABLE notes (key_id TEXT NOT NULL REFERENCES keys (id), text TEXT) STRICT",),
    ),
)


async def filled(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A file of the present version with rows in every table; what is in them."""
    async with Database(path):
        pass
    connection = sqlite3.connect(path, isolation_level=None)
    rows = fill(connection)
    connection.close()
    # A box is in one network at most.
    assert all(len(rows[name]) >= 2 for name in rows if name != "network")
    return rows


async def test_the_script_makes_the_version_that_it_says(tmp_path: Path) -> None:
    path = tmp_path / "box.db"
    async with Database(path):
        pass
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (CURRENT.version,)
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)


async def test_a_file_of_an_earlier_version_is_migrated_and_keeps_all(tmp_path: Path) -> None:
    """Two versions later it has the schema of a new file, and every row."""
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    before = await filled(old)
    for path in (old, new):
        async with Database(path, NEXT):
            pass
    migrated, fresh = sqlite3.connect(old), sqlite3.connect(new)
    assert schema(migrated) == schema(fresh) != {}
    assert migrated.execute("PRAGMA user_version").fetchone() == (CURRENT.version + 2,)
    assert migrated.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert migrated.execute("PRAGMA foreign_key_check").fetchall() == []
    assert migrated.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    after = contents(migrated)
    assert after.pop("notes") == []
    assert {row.pop("colour") for row in after["keys"]} == {"blue"}
    assert after == before


@pytest.mark.parametrize(
    "last",
    ["CREATE TABLE keys (id TEXT)", "INSERT INTO notes VALUES ('key_none', 'of nobody')"],
    ids=["a statement fails", "a reference is broken"],
)
async def test_a_migration_that_fails_changes_nothing(tmp_path: Path, last: str) -> None:
    path = tmp_path / "box.db"
    before = await filled(path)
    failing = NEXT._replace(migrations=(*NEXT.migrations, (last,)))
    with pytest.raises((sqlite3.Error, DatabaseUnusable)):
        async with Database(path, failing):
            pass
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (CURRENT.version,)
    assert contents(connection) == before


async def test_opening_again_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "box.db"
    async with Database(path) as database:
        await create(database, "a")
    async with Database(path) as database:
        assert [key.name for key in await keys.ls(database)] == ["a"]


async def test_a_new_file_is_nobody_elses_to_read(tmp_path: Path) -> None:
    path = tmp_path / "box.db"
    async with Database(path) as database:
        await database.write((INSERT, ("a", 1, 1, "d")))
        modes = [file.stat().st_mode & 0o777 for file in files(tmp_path)]
        assert modes == [0o600] * 3  # with -wal and -shm


async def test_two_that_open_a_new_file_at_once_both_find_it_ready(tmp_path: Path) -> None:
    opened = [Database(tmp_path / "box.db") for _ in range(4)]
    await asyncio.gather(*(database.open() for database in opened))
    await asyncio.gather(
        *(one.write((INSERT, (str(n), 1, 1, "d"))) for n, one in enumerate(opened))
    )
    assert len(await opened[0].read("SELECT * FROM model_files")) == 4
    for database in opened:
        await database.close()


async def refused(path: Path) -> str:
    """Opening is a one-sentence error and the file stays as it was."""
    before = contents_of(path.parent)
    with pytest.raises(DatabaseUnusable) as caught:
        async with Database(path):
            pass
    assert str(path) in caught.value.message and "\n" not in caught.value.message
    assert contents_of(path.parent) == before
    return caught.value.message


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (CURRENT.version + 1, "newer Pinaivu Box"),
        *((version, "start with a new home") for version in range(1, CURRENT.oldest)),
    ],
)
async def test_a_file_of_a_version_that_is_not_read_is_refused_and_left_alone(
    tmp_path: Path, version: int, reason: str
) -> None:
    path = tmp_path / "box.db"
    async with Database(path):
        pass
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    assert reason in await refused(path)


@pytest.mark.parametrize("application_id", [0x12345678, 0])
async def test_a_database_of_another_program_is_refused_and_left_alone(
    tmp_path: Path, application_id: int
) -> None:
    """Also one that, like most programs' files, has no application id but has tables."""
    path = tmp_path / "box.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE songs (title TEXT)")
    connection.execute(f"PRAGMA application_id = {application_id}")
    connection.commit()
    connection.close()
    assert "another program" in await refused(path)


async def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "box.db"
    diary = "Dear diary, today I was mistaken for a database.\n" * 100
    path.write_text(diary)
    await refused(path)
    assert path.read_text() == diary


# -- group commit ----------------------------------------------------------------------------------


def commits(path: Path) -> int:
    """Transactions in the write-ahead log: frames whose database size is set (SQLite's format)."""
    data = path.with_name(path.name + "-wal").read_bytes()
    page = int.from_bytes(data[8:12], "big")
    frames = range(32, len(data), 24 + page)
    return sum(data[at + 4 : at + 8] != bytes(4) for at in frames)


async def test_64_concurrent_writes_share_a_few_commits(tmp_path: Path) -> None:
    path = tmp_path / "box.db"
    async with Database(path) as database:
        before = commits(path)
        counts = await asyncio.gather(
            *(database.write((INSERT, (str(n), n, n, "d"))) for n in range(64))
        )
        assert counts == [[1]] * 64
        assert len(await database.read("SELECT * FROM model_files")) == 64
        assert 1 <= commits(path) - before <= 8


def test_acknowledged_writes_survive_a_kill(tmp_path: Path) -> None:
    """64 writes at once, the process killed as soon as the last is acknowledged."""
    code = f"""
import asyncio, os, pathlib, signal
from pinaivu_box.store.database import Database
from pinaivu_box.store.new_keys import Draft, NewKeys
async def main():
    database = Database(pathlib.Path({str(tmp_path / "box.db")!r}))
    await database.open()
    async def write(n):
        await database.write(({INSERT!r}, (str(n), n, n, "d")))
        print(n, flush=True)
    await asyncio.gather(*(write(n) for n in range(64)))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -9, done.stderr
    connection = sqlite3.connect(tmp_path / "box.db")
    stored = {path for (path,) in connection.execute("SELECT path FROM model_files")}
    assert stored == set(done.stdout.split()) == {str(n) for n in range(64)}
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize(
    "bad",
    [
        (INSERT, ("first", 1, 1, "d")),  # the key is taken
        (INSERT, ("bad", "not a number", 1, "d")),
        (INSERT, ("bad", 1)),
        (INSERT, ("bad", object(), 1, "d")),
        (INSERT, ("bad", 2**63, 1, "d")),
        ("INSERT INTO nothing VALUES (1)", ()),
        ("this is not SQL", ()),
        ("INSERT INTO receipts VALUES ('r', 'no', 0, x'00', x'00', x'00', '', '', NULL)", ()),
    ],
    ids=[
        "unique", "type", "count", "object", "overflow", "no table", "syntax", "reference",
    ],
)  # fmt: skip
async def test_one_failing_write_among_32_fails_alone(
    tmp_path: Path, bad: tuple[str, tuple[Any, ...]]
) -> None:
    """Its own transaction is undone whole, the others are written, and writing goes on."""
    path = tmp_path / "box.db"
    database = Database(path)
    await database.open()
    await database.write((INSERT, ("first", 1, 1, "d")))
    writes = {str(n): [(INSERT, (str(n), n, n, "d"))] for n in range(32)}
    writes["17"].append(bad)  # a good statement, then the bad one: neither may stay
    try:
        async with asyncio.timeout(DEADLINE):
            results = await asyncio.gather(
                *(database.write(*statements) for statements in writes.values()),
                return_exceptions=True,
            )
            await database.write((INSERT, ("after", 1, 1, "d")))
            await database.close()
    except TimeoutError:
        # Its threads would keep this process from ending.
        await database._reader.close()
        await database._writer.close()
        raise
    assert isinstance(results.pop(17), Exception)
    assert results == [[1]] * 31
    connection = sqlite3.connect(path)
    stored = {row[0] for row in connection.execute("SELECT path FROM model_files")}
    assert stored == {str(n) for n in range(32) if n != 17} | {"first", "after"}


async def test_a_cancelled_caller_does_not_cancel_its_write(tmp_path: Path) -> None:
    async with Database(tmp_path / "box.db") as database:
        task = asyncio.create_task(database.write((INSERT, ("a", 1, 1, "d"))))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await database.write((INSERT, ("b", 1, 1, "d")))
        assert len(await database.read("SELECT * FROM model_files")) == 2


@pytest.mark.parametrize(("seconds", "is_stuck"), [(3.0, False), (6.0, True)])
async def test_a_write_is_stuck_if_one_of_its_statements_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, is_stuck: bool
) -> None:
    """Many statements may take long together on a busy machine."""
    now, found = 1000.0, []
    monkeypatch.setattr(database_module, "time", SimpleNamespace(monotonic=lambda: now))
    async with Database(tmp_path / "a.db") as database:
        await database.write((INSERT, ("before", 1, 1, "d")))
        execute = database._writer.execute

        async def slowly(*statement: Any) -> Any:
            nonlocal now
            now += seconds
            found.append(await database.why_not_writable(within=1000))
            return await execute(*statement)

        monkeypatch.setattr(database._writer, "execute", slowly)
        await database.write(*((INSERT, (f"{n}", 1, 1, "d")) for n in range(4)))
    assert len(found) == 6 and all((why is not None) == is_stuck for why in found)


async def test_no_write_is_stuck_because_the_loop_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it did something else the statement was done; it has only not heard of that."""
    now = 1000.0
    monkeypatch.setattr(database_module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(database_module, "_LOOKS", 10_000)  # however slow this machine is
    async with Database(tmp_path / "a.db") as database:
        await database.write((INSERT, ("before", 1, 1, "d")))
        writing = asyncio.create_task(database.write((INSERT, ("after", 1, 1, "d"))))
        while database._waiting_since is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        now += 60.0
        assert await database.why_not_writable(within=1000) is None
        assert await writing == [1]


async def test_close_writes_what_is_queued(tmp_path: Path) -> None:
    database = Database(tmp_path / "box.db")
    await database.open()
    tasks = [asyncio.create_task(database.write((INSERT, (str(n), 1, 1, "d")))) for n in range(20)]
    await asyncio.sleep(0)
    await database.close()
    await asyncio.gather(*tasks)
    connection = sqlite3.connect(tmp_path / "box.db")
    assert connection.execute("SELECT count(*) FROM model_files").fetchone() == (20,)


# -- keys ------------------------------------------------------------------------------------------

BY = Actor("test", "local")


async def create(
    database: Database, name: str, policy: Policy | None = None
) -> tuple[keys.Key, str]:
    """A key as `pinaivu keys create` makes it."""
    batch = NewKeys(database, BY)
    await batch.add(Draft(name, None, policy or Policy(), None))
    (created,) = await batch.write()
    return created


BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase


def test_the_checksum_is_the_crc_32_of_the_random_part_in_base62() -> None:
    for _ in range(50):
        secret = keys.generate()
        assert secret.startswith("sk-pnv-") and len(secret) >= len("sk-pnv-") + 40
        body = secret.removeprefix("sk-pnv-")
        assert set(body) <= set(BASE62)
        value = 0
        for letter in body[-6:]:
            value = value * 62 + BASE62.index(letter)
        assert value == zlib.crc32(body[:-6].encode())
        assert keys.well_formed(secret)


def test_any_single_changed_character_is_noticed() -> None:
    """Every position, every other letter or digit."""
    secret = keys.generate()
    for at in range(len(secret)):
        for letter in BASE62 + "-_ é":
            if letter != secret[at]:
                assert not keys.well_formed(secret[:at] + letter + secret[at + 1 :])


def test_a_cut_lengthened_or_transposed_key_is_noticed() -> None:
    secret = keys.generate()
    wrong = [secret[:end] for end in range(len(secret))]
    wrong += [secret + "A", " " + secret, secret + "\n", secret.upper(), secret[7:], ""]
    for at in range(7, len(secret) - 1):
        wrong.append(secret[:at] + secret[at + 1] + secret[at] + secret[at + 2 :])
    assert not any(keys.well_formed(one) for one in wrong if one != secret)


def test_generated_keys_are_unique_and_use_all_letters() -> None:
    made = [keys.generate() for _ in range(2000)]
    assert len(set(made)) == 2000
    assert len({secret[:13] for secret in made}) > 1990  # also by what is shown of them
    assert set("".join(secret[7:-6] for secret in made)) == set(BASE62)


async def test_a_key_is_stored_as_its_hash_only_and_found_by_it(tmp_path: Path) -> None:
    path = tmp_path / "box.db"
    async with Database(path) as database:
        key, secret = await create(database, "n", Policy(scopes=SCOPES))
        other_key, other = await create(database, "m")
        assert await keys.find(database, secret) == (key, False)
        assert await keys.find(database, other) == (other_key, False) != (key, False)
        assert await keys.find(database, keys.generate()) is None
        await keys.revoke(database, key, BY)
        found = await keys.find(database, secret)
        assert found is not None and found[0].revoked_at is not None
    stored = contents_of(tmp_path)
    assert secret.encode() not in stored and secret[13:-4].encode() not in stored


# -- money -----------------------------------------------------------------------------------------

PRICES = st.one_of(
    st.decimals(0, 10**6, places=6, allow_nan=False).map(str),
    st.decimals(0, 10**6, places=6, allow_nan=False).map(lambda price: format(price, "f")),
    st.sampled_from(["0", "0.0", "1", "1.50", "1E-6", "1e3", "0.000001", "123456.123456"]),
)


@given(st.integers(0, 10**12), PRICES)
def test_a_cost_is_exact(tokens: int, price: str) -> None:
    made = amount.prices(price).cost(tokens, 0, 0)
    assert isinstance(made, int)
    assert made == amount.prices(price).cost(0, 0, tokens)
    assert Fraction(made, amount.UNITS) == Fraction(price) * tokens / 1000


@given(st.lists(st.integers(0, 10**6), max_size=20), PRICES)
def test_costs_add_up(parts: list[int], price: str) -> None:
    """The sum of the requests is what their tokens cost together."""
    cost = amount.prices(price).cost
    assert sum(cost(tokens, 0, 0) for tokens in parts) == cost(sum(parts), 0, 0)


@given(st.integers(0, 10**30))
def test_an_amount_in_text_is_exact_and_plain(units: int) -> None:
    text = amount.to_text(units)
    assert Fraction(text) == Fraction(units, amount.UNITS)
    assert set(text) <= set(string.digits + ".")
    assert "." not in text or text[-1] not in "0."
    assert text == "0" or not text.startswith("0") or text.startswith("0.")


async def test_however_often_a_scrub_is_asked_for_it_is_made_once_in_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    scrub = Database._scrub

    async def counted(self: Database) -> None:
        made.append(self)
        await scrub(self)

    monkeypatch.setattr(Database, "_scrub", counted)
    async with Database(tmp_path / "box.db") as database:
        await asyncio.gather(*(database.scrub() for _ in range(5)))
        assert len(made) == 2  # those who came while the first ran share the second
        for _ in range(5):
            database.scrub_later()
            await asyncio.sleep(0)
        assert len(made) == 2
    assert len(made) == 3  # before the file is closed

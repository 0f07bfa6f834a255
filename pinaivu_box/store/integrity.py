"""Checks a database file without changing it: is it ours, whole, and of a version that is read?

Synchronous, and apart from `Database`, which migrates what it opens.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from pinaivu_box.errors import DatabaseUnusable
from pinaivu_box.store import log
from pinaivu_box.store.schema import APPLICATION_ID, CURRENT

_BUSY_SECONDS = 15.0


@contextlib.contextmanager
def reading(path: Path, *, alone: bool = False) -> Iterator[sqlite3.Connection]:
    """A read-only connection.  `alone` says that nobody else has the file: SQLite then makes no
    files beside it.  Raises sqlite3.Error."""
    address = path.absolute().as_uri() + ("?immutable=1" if alone else "?mode=ro")
    with contextlib.closing(
        sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
    ) as connection:
        yield connection


def check(path: Path, name: str, *, alone: bool = False, home: Path | None = None) -> int:
    """Read the whole file; returns the version of its schema.

    Raises DatabaseUnusable, in whose message the file is called `name`.  `home` is the one that it
    is of.
    """
    try:
        with reading(path, alone=alone) as connection:
            version = _version(connection, name, home)
            problems = [row[0] for row in connection.execute("PRAGMA integrity_check(10)")]
            strays = connection.execute("PRAGMA foreign_key_check").fetchmany(10)
    except sqlite3.Error as error:
        raise DatabaseUnusable(f"{name} is damaged or cannot be read: {error}.") from error
    if problems != ["ok"]:
        # The first is sometimes a heading of several lines.
        words = " ".join(" ".join(problems).split())
        raise DatabaseUnusable(f"{name} is damaged: {words[:200]}.")
    if strays:
        raise DatabaseUnusable(
            f"{name} is damaged: a row of {strays[0][0]} refers to none in {strays[0][2]}."
        )
    return version


def check_version(home: Path) -> None:
    """Refuse a database of a version that is not read.  Raises DatabaseUnusable, sqlite3.Error."""
    path = home / "pinaivu.db"
    if path.exists():
        with reading(path) as connection:
            _version(connection, str(path), home)


def _version(connection: sqlite3.Connection, name: str, home: Path | None) -> int:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise DatabaseUnusable(f"{name} is no database of Pinaivu Box.")
    CURRENT.check_version(version, name, home=home)
    return int(version)


def make_backup_of(path: Path) -> None:
    """Make of a copy, that nobody else has, what is restored later.  Its sessions and one-time
    links are deleted: a backup revives none that has ended since.  And it says that its log of
    receipts must not go on, which has grown elsewhere since.  Raises sqlite3.Error."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # no other file beside it
        connection.execute("PRAGMA secure_delete = ON")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version >= 6:  # which has them
            for table in ("sessions", "login_links"):
                connection.execute(f"DELETE FROM {table}")
        if version >= 7:
            connection.execute(*log.to_do(log.RESTORED))


def copy(source: Path, target: Path) -> None:
    """A consistent copy while others write.  Raises sqlite3.Error."""
    with reading(source) as old, contextlib.closing(sqlite3.connect(target)) as new:
        # All pages in one step: that is one snapshot, and in WAL mode writers do not wait for it.
        # A copy in several steps begins again with each commit of another process.
        old.backup(new)

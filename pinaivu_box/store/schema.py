"""The schema of the database file: a new file gets `schema.sql`, an older one is migrated to it.

`PRAGMA user_version` says which version a file has.  Whoever changes `schema.sql` raises the
version at its end by one, and adds to `MIGRATIONS` what makes the same of a file of the version
before.  A migration is never changed once it is released: a later one corrects it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import aiosqlite

from pinaivu_box.errors import DatabaseUnusable, SchemaUnsupported

# "pnvB": tells our files from any other SQLite database.
APPLICATION_ID = 0x706E7642
OLDEST_VERSION = 5  # that is still read
MIGRATIONS: tuple[tuple[str, ...], ...] = ()  # the first: from OLDEST_VERSION to the one after it


class Schema(NamedTuple):
    """`script` makes the newest version's tables in an empty file and sets its version;
    `migrations[n]` brings a file of version `oldest + n` to the next."""

    script: str
    oldest: int
    migrations: tuple[tuple[str, ...], ...] = ()

    @property
    def version(self) -> int:
        return self.oldest + len(self.migrations)

    def check_version(self, version: int, name: str) -> None:
        """Refuse a file of a version that is not read, which the error calls `name`.

        Raises SchemaUnsupported.
        """
        if version > self.version:
            raise SchemaUnsupported(
                f"{name} was written by a newer Pinaivu Box (schema {version}, this program reads "
                f"up to {self.version}): update the program."
            )
        if version < self.oldest:
            raise SchemaUnsupported(
                f"{name} was written by a Pinaivu Box from before its first release (schema "
                f"{version}, this program reads {self.oldest} and later): start with a new home."
            )


CURRENT = Schema(
    Path(__file__).with_name("schema.sql").read_text(encoding="utf-8"), OLDEST_VERSION, MIGRATIONS
)


async def refuse_foreign(connection: aiosqlite.Connection, path: Path) -> None:
    """Raises DatabaseUnusable for a file of another program, before anything in it is changed."""
    # In this order: another process may make the tables, and write the id with them, in between.
    tables = await _number(connection, "SELECT count(*) FROM sqlite_schema")
    application = await _number(connection, "PRAGMA application_id")
    # A file that nobody has written to has neither an id nor tables: it will be ours.
    if application != APPLICATION_ID and (application or tables):
        raise DatabaseUnusable(f"{path} is a database of another program: choose another --home.")


async def prepare(connection: aiosqlite.Connection, path: Path, schema: Schema) -> None:
    """Give a new file the schema, and migrate an older one, in one transaction.

    Raises SchemaUnsupported, DatabaseUnusable.
    """
    # IMMEDIATE: of two processes that open a new file at once, the second waits and finds it done.
    await connection.execute("BEGIN IMMEDIATE")
    try:
        version = await _number(connection, "PRAGMA user_version")
        if version == 0:
            for statement in _statements(schema.script):
                await connection.execute(statement)
            await connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        else:
            schema.check_version(version, str(path))
            await _migrate(connection, path, schema, version)
        await connection.execute("COMMIT")
    except BaseException:
        await connection.execute("ROLLBACK")
        raise


async def _migrate(
    connection: aiosqlite.Connection, path: Path, schema: Schema, version: int
) -> None:
    if version == schema.version:
        return
    for migration in schema.migrations[version - schema.oldest :]:
        for statement in migration:
            await connection.execute(statement)
    await connection.execute(f"PRAGMA user_version = {schema.version}")
    if await connection.execute_fetchall("PRAGMA foreign_key_check"):
        raise DatabaseUnusable(f"{path} has rows that refer to none: 'pinaivu doctor' names them.")


def _statements(script: str) -> Iterator[str]:
    """One by one: `executescript` would commit the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


async def _number(connection: aiosqlite.Connection, query: str) -> int:
    ((number,),) = await connection.execute_fetchall(query)
    return int(number)

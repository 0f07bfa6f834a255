"""The schema of the database file: a new file gets `schema.sql`, an older one is migrated to it.

`PRAGMA user_version` says which version a file has.  Whoever changes `schema.sql` raises the
version at its end by one, and adds to `MIGRATIONS` what makes the same of a file of the version
before: statements, and the names of tables, indexes and triggers, for the statements that make
these in the script.  A migration never does anything else once it is released: a later one corrects
it.  So whoever changes what a migration names writes there what the script said until then.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import aiosqlite

from pinaivu_box import __version__
from pinaivu_box.errors import DatabaseUnusable, SchemaUnsupported
from pinaivu_box.store import migration_backups

# "pnvB": tells our files from any other SQLite database.
APPLICATION_ID = 0x706E7642
OLDEST_VERSION = 5  # that is still read
_CREATED = re.compile(r"^CREATE (?:UNIQUE )?(?:TABLE|INDEX|TRIGGER) ([a-z_]+)", re.MULTILINE)
_TO_6 = (  # the pages: sessions, links for logging in, incidents, chats
    "ALTER TABLE accounts ADD COLUMN pages_key TEXT",
    "sessions", "sessions_by_account",
    "login_links",
    "incidents", "incidents_by_time",
    "runs",
    "latencies_by_hour", "requests_are_timed",
    """INSERT INTO latencies_by_hour
    SELECT created_at - created_at % 3600000, kind, coalesce(
        (SELECT min(ms) FROM latency_bounds WHERE ms >= took),
        (SELECT max(ms) FROM latency_bounds)
    ), count(*)
    FROM (
        SELECT created_at, 'ttft' AS kind, ttft_ms AS took FROM requests
        UNION ALL SELECT created_at, 'total', total_ms FROM requests
    )
    WHERE took IS NOT NULL AND created_at >= strftime('%s', 'now') * 1000 - 604800000
    GROUP BY 1, 2, 3""",
    "account_identities", "account_identities_by_account",
    "audit_by_target", "audit_by_actor",
    "DROP TRIGGER audit_is_not_changed",
    "audit_is_not_changed",
    "account_secrets",
    "conversations", "conversations_by_time",
    "messages", "messages_by_conversation", "messages_by_account",
    "chat_sums", "conversations_are_counted", "conversations_are_discounted",
    "messages_are_counted", "messages_are_discounted", "messages_are_counted_anew",
    "memories", "memories_by_account",
    "chat_settings",
)  # fmt: skip
_LOG = (  # the log of receipts, and its checkpoints
    "ALTER TABLE receipts ADD COLUMN log_entry INTEGER",
    "receipts_by_entry", "receipts_without_entry",
    "logs",
    "log_entries", "log_entries_are_not_changed", "log_entries_are_not_deleted",
    "log_entries_are_not_replaced",
    "log_tiles",
    "log_checkpoints", "log_checkpoints_cosigned",
    "log_removals", "log_removals_by_log",
    "log_pending",
    "INSERT INTO log_pending VALUES ('adopt')",
)  # fmt: skip
_WITNESSES = (  # checkpoints of others, cosignatures, evidence
    "witnessed", "witnessed_by_box",
    "log_alarms", "log_alarms_by_origin",
)  # fmt: skip
_TRANSCRIPTS_AND_AUDITS = (
    "ALTER TABLE keys ADD COLUMN transcript_key BLOB",
    "transcripts", "transcripts_go_with_receipts",
    """CREATE TABLE peer_audits (
        node_id    TEXT PRIMARY KEY,
        watched    INTEGER NOT NULL,
        agreed     INTEGER NOT NULL,
        failed     INTEGER NOT NULL,
        disproved  INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    "ledger_disproofs", "ledger_disproofs_are_not_changed", "ledger_disproofs_are_not_deleted",
    "ledger_disproofs_are_not_replaced",
)  # fmt: skip
_TO_7 = (*_LOG, *_WITNESSES, *_TRANSCRIPTS_AND_AUDITS)
_TO_8 = ("ALTER TABLE peer_audits ADD COLUMN undecided INTEGER NOT NULL DEFAULT 0",)
# The first: from OLDEST_VERSION to the one after it.
MIGRATIONS: tuple[tuple[str, ...], ...] = (_TO_6, _TO_7, _TO_8)


class Schema(NamedTuple):
    """`script` makes the newest version's tables in an empty file and sets its version;
    `migrations[n]` brings a file of version `oldest + n` to the next: statements, and names of what
    the script makes."""

    script: str
    oldest: int
    migrations: tuple[tuple[str, ...], ...] = ()

    @property
    def version(self) -> int:
        return self.oldest + len(self.migrations)

    def check_version(
        self, version: int, name: str, *, home: Path | None = None, program: str = ""
    ) -> None:
        """Refuse a file of a version that is not read, which the error calls `name`.

        `home` may have a backup from before the upgrade; `program` is the version of the program
        that wrote the file, if it is known.

        Raises SchemaUnsupported.
        """
        if version > self.version:
            by = f" {program}" if program else ""
            raise SchemaUnsupported(
                f"{name} was written by a newer Pinaivu Box{by} (schema {version}; this is "
                f"version {__version__}, which reads up to schema {self.version}): install the "
                f"newer version again, or {self._restorable(home)}."
            )
        if version < self.oldest:
            raise SchemaUnsupported(
                f"{name} was written by a Pinaivu Box from before its first release (schema "
                f"{version}, this program reads {self.oldest} and later): start with a new home."
            )

    def _restorable(self, home: Path | None) -> str:
        backup = None if home is None else migration_backups.readable_by(self.version, home)
        if home is None or backup is None:
            return "restore a backup that this version made"
        command = ["pinaivu", "restore", str(backup), "--home", str(home), "--force"]
        return (
            "go back to the backup from before the upgrade, without what came since: "
            f"{shlex.join(command)}"
        )


# Makes a backup before a migration from one version of the schema to another.
BackUp = Callable[[int, int], None]

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


async def prepare(
    connection: aiosqlite.Connection, path: Path, schema: Schema, back_up: BackUp | None = None
) -> None:
    """Give a new file the schema, and migrate an older one, in one transaction.  `back_up` is
    called before anything of an older file is changed, and nothing is if it raises.

    Raises SchemaUnsupported, DatabaseUnusable, and what `back_up` raises.
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
            schema.check_version(version, str(path), home=path.parent)
            if version < schema.version:
                if back_up is not None:  # meanwhile nobody else can write: see above
                    await asyncio.to_thread(back_up, version, schema.version)
                await _migrate(connection, path, schema, version)
        await connection.execute("COMMIT")
    except BaseException:
        await connection.execute("ROLLBACK")
        raise


async def _migrate(
    connection: aiosqlite.Connection, path: Path, schema: Schema, version: int
) -> None:
    created = {
        match[1]: statement
        for statement in _statements(schema.script)
        if (match := _CREATED.search(statement))
    }
    for migration in schema.migrations[version - schema.oldest :]:
        for step in migration:
            await connection.execute(created.get(step, step))
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

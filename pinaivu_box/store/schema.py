"""The schema of the database file: a new file gets `schema.sql`, an older one is migrated to it.

`PRAGMA user_version` says which version a file has.  Whoever changes `schema.sql` raises the
version at its end by one, and adds to `MIGRATIONS` what makes the same of a file of the version
before.  A migration is never changed once it is released: a later one corrects it.
"""

from __future__ import annotations

import asyncio
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
_TO_6 = (  # the pages: sessions, links for logging in, incidents, chats
    "ALTER TABLE accounts ADD COLUMN pages_key TEXT",
    """CREATE TABLE sessions (
        id TEXT PRIMARY KEY,
        account_id TEXT NOT NULL REFERENCES accounts (id),
        token_hash BLOB NOT NULL UNIQUE,
        csrf TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        last_seen INTEGER NOT NULL,
        address TEXT NOT NULL,
        user_agent TEXT NOT NULL
    ) STRICT""",
    "CREATE INDEX sessions_by_account ON sessions (account_id, created_at)",
    """CREATE TABLE login_links (
        id TEXT PRIMARY KEY,
        token_hash BLOB NOT NULL UNIQUE,
        account_id TEXT REFERENCES accounts (id),
        created_by TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL
    ) STRICT""",
    """CREATE TABLE incidents (
        id TEXT PRIMARY KEY,
        kind TEXT NOT NULL CHECK (kind IN ('engine', 'peer', 'errors')),
        subject TEXT NOT NULL,
        began_at INTEGER NOT NULL,
        ended_at INTEGER,
        detail TEXT NOT NULL
    ) STRICT""",
    "CREATE INDEX incidents_by_time ON incidents (began_at)",
    """CREATE TABLE runs (
        id INTEGER PRIMARY KEY,
        began_at INTEGER NOT NULL,
        seen_at INTEGER NOT NULL
    ) STRICT""",
    """CREATE TABLE latencies_by_hour (
        since INTEGER NOT NULL,
        kind TEXT NOT NULL,
        ms INTEGER NOT NULL,
        count INTEGER NOT NULL,
        PRIMARY KEY (since, kind, ms)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TRIGGER requests_are_timed AFTER INSERT ON requests BEGIN
        INSERT INTO latencies_by_hour
        SELECT NEW.created_at - NEW.created_at % 3600000, 'ttft', coalesce(
            (SELECT min(ms) FROM latency_bounds WHERE ms >= NEW.ttft_ms),
            (SELECT max(ms) FROM latency_bounds)
        ), 1
        WHERE NEW.ttft_ms IS NOT NULL
        ON CONFLICT DO UPDATE SET count = count + 1;
        INSERT INTO latencies_by_hour
        SELECT NEW.created_at - NEW.created_at % 3600000, 'total', coalesce(
            (SELECT min(ms) FROM latency_bounds WHERE ms >= NEW.total_ms),
            (SELECT max(ms) FROM latency_bounds)
        ), 1
        WHERE NEW.total_ms IS NOT NULL
        ON CONFLICT DO UPDATE SET count = count + 1;
    END""",
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
    """CREATE TABLE account_identities (
        issuer TEXT NOT NULL,
        subject TEXT NOT NULL,
        account_id TEXT NOT NULL REFERENCES accounts (id),
        linked_at INTEGER NOT NULL,
        PRIMARY KEY (issuer, subject)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX account_identities_by_account ON account_identities (account_id)",
    "CREATE INDEX audit_by_target ON audit (target, id)",
    "CREATE INDEX audit_by_actor ON audit (actor, id)",
    "DROP TRIGGER audit_is_not_changed",
    """CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit
    WHEN NEW.id IS NOT OLD.id
      OR NEW.at IS NOT OLD.at
      OR NEW.actor IS NOT OLD.actor
      OR NEW.source IS NOT OLD.source
      OR NEW.action IS NOT OLD.action
      OR NEW.target IS NOT OLD.target
      OR NEW.detail IS NOT json_replace(
          OLD.detail, '$.name', 'erased', '$.account', 'erased',
          '$.before.name', 'erased', '$.after.name', 'erased'
      )
    BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END""",
    """CREATE TABLE account_secrets (
        account_id  TEXT NOT NULL REFERENCES accounts (id),
        kind        TEXT NOT NULL,
        salt        BLOB NOT NULL,
        ops_limit   INTEGER NOT NULL,
        mem_limit   INTEGER NOT NULL,
        wrapped     BLOB NOT NULL,
        created_at  INTEGER NOT NULL,
        PRIMARY KEY (account_id, kind)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE conversations (
        id          TEXT PRIMARY KEY,
        account_id  TEXT NOT NULL REFERENCES accounts (id),
        created_at  INTEGER NOT NULL,
        updated_at  INTEGER NOT NULL,
        sealed      BLOB NOT NULL
    ) STRICT""",
    "CREATE INDEX conversations_by_time ON conversations (account_id, updated_at, id)",
    """CREATE TABLE messages (
        id               TEXT PRIMARY KEY,
        conversation_id  TEXT NOT NULL REFERENCES conversations (id),
        account_id       TEXT NOT NULL REFERENCES accounts (id),
        parent_id        TEXT,
        created_at       INTEGER NOT NULL,
        sealed           BLOB NOT NULL,
        bytes            INTEGER NOT NULL
    ) STRICT""",
    "CREATE INDEX messages_by_conversation ON messages (conversation_id, created_at, id, bytes)",
    "CREATE INDEX messages_by_account ON messages (account_id)",
    """CREATE TABLE chat_sums (
        account_id     TEXT PRIMARY KEY,
        conversations  INTEGER NOT NULL DEFAULT 0,
        bytes          INTEGER NOT NULL DEFAULT 0
    ) STRICT, WITHOUT ROWID""",
    """CREATE TRIGGER conversations_are_counted AFTER INSERT ON conversations BEGIN
        INSERT INTO chat_sums VALUES (NEW.account_id, 1, 0)
        ON CONFLICT DO UPDATE SET conversations = conversations + 1;
    END""",
    """CREATE TRIGGER conversations_are_discounted AFTER DELETE ON conversations BEGIN
        UPDATE chat_sums SET conversations = conversations - 1 WHERE account_id = OLD.account_id;
    END""",
    """CREATE TRIGGER messages_are_counted AFTER INSERT ON messages BEGIN
        INSERT INTO chat_sums VALUES (NEW.account_id, 0, NEW.bytes)
        ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes;
    END""",
    """CREATE TRIGGER messages_are_discounted AFTER DELETE ON messages BEGIN
        UPDATE chat_sums SET bytes = bytes - OLD.bytes WHERE account_id = OLD.account_id;
    END""",
    """CREATE TRIGGER messages_are_counted_anew AFTER UPDATE OF bytes ON messages BEGIN
        UPDATE chat_sums SET bytes = bytes - OLD.bytes + NEW.bytes
        WHERE account_id = NEW.account_id;
    END""",
    """CREATE TABLE memories (
        id          TEXT PRIMARY KEY,
        account_id  TEXT NOT NULL REFERENCES accounts (id),
        created_at  INTEGER NOT NULL,
        updated_at  INTEGER NOT NULL,
        sealed      BLOB NOT NULL,
        vector      BLOB NOT NULL
    ) STRICT""",
    "CREATE INDEX memories_by_account ON memories (account_id, created_at)",
    """CREATE TABLE chat_settings (
        account_id  TEXT PRIMARY KEY REFERENCES accounts (id),
        sealed      BLOB NOT NULL
    ) STRICT, WITHOUT ROWID""",
)
_LOG = (  # the log of receipts, and its checkpoints
    "ALTER TABLE receipts ADD COLUMN log_entry INTEGER",
    "CREATE UNIQUE INDEX receipts_by_entry ON receipts (log_entry) WHERE log_entry IS NOT NULL",
    "CREATE INDEX receipts_without_entry ON receipts (created_at) WHERE log_entry IS NULL",
    """CREATE TABLE logs (
        id           INTEGER PRIMARY KEY,
        origin       TEXT NOT NULL UNIQUE,
        first_entry  INTEGER NOT NULL,
        size         INTEGER,
        restart      BLOB,
        signature    BLOB
    ) STRICT""",
    """CREATE TABLE log_entries (
        id    INTEGER PRIMARY KEY AUTOINCREMENT,
        hash  BLOB NOT NULL
    ) STRICT""",
    """CREATE TRIGGER log_entries_are_not_changed BEFORE UPDATE ON log_entries WHEN 1
    BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END""",
    """CREATE TRIGGER log_entries_are_not_deleted BEFORE DELETE ON log_entries
    BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END""",
    """CREATE TRIGGER log_entries_are_not_replaced BEFORE INSERT ON log_entries
    WHEN EXISTS (SELECT 1 FROM log_entries WHERE id = NEW.id)
    BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END""",
    """CREATE TABLE log_tiles (
        log     INTEGER NOT NULL REFERENCES logs (id),
        level   INTEGER NOT NULL,
        number  INTEGER NOT NULL,
        hashes  BLOB NOT NULL,
        PRIMARY KEY (log, level, number)
    ) STRICT""",
    """CREATE TABLE log_checkpoints (
        log       INTEGER NOT NULL REFERENCES logs (id),
        size      INTEGER NOT NULL,
        at        INTEGER NOT NULL,
        note      TEXT NOT NULL,
        cosigned  INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (log, size)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX log_checkpoints_cosigned ON log_checkpoints (log, size) WHERE cosigned > 0",
    """CREATE TABLE log_removals (
        id         INTEGER PRIMARY KEY,
        log        INTEGER NOT NULL REFERENCES logs (id),
        signed     BLOB NOT NULL,
        signature  BLOB NOT NULL
    ) STRICT""",
    "CREATE INDEX log_removals_by_log ON log_removals (log, id)",
    "CREATE TABLE log_pending (task TEXT PRIMARY KEY) STRICT, WITHOUT ROWID",
    "INSERT INTO log_pending VALUES ('adopt')",
)
_WITNESSES: tuple[str, ...] = (  # checkpoints of others, cosignatures, evidence
    """CREATE TABLE witnessed (
        origin      TEXT PRIMARY KEY,
        node_id     TEXT NOT NULL,
        size        INTEGER NOT NULL,
        root        BLOB NOT NULL,
        note        TEXT NOT NULL,
        cosigned_at INTEGER NOT NULL,
        restart     BLOB NOT NULL
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX witnessed_by_box ON witnessed (node_id)",
    """CREATE TABLE log_alarms (
        id          TEXT PRIMARY KEY,
        kind        TEXT NOT NULL,
        node_id     TEXT NOT NULL,
        origin      TEXT NOT NULL,
        found_at    INTEGER NOT NULL,
        detail      TEXT NOT NULL,
        document    BLOB NOT NULL,
        dismissed   INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX log_alarms_by_origin ON log_alarms (origin, kind)",
)
_TRANSCRIPTS_AND_AUDITS: tuple[str, ...] = (
    "ALTER TABLE keys ADD COLUMN transcript_key BLOB",
    """CREATE TABLE transcripts (
        request_id  TEXT PRIMARY KEY,
        sealed_to   BLOB,
        body        BLOB NOT NULL
    ) STRICT""",
    """CREATE TRIGGER transcripts_go_with_receipts AFTER DELETE ON receipts BEGIN
        DELETE FROM transcripts WHERE request_id = OLD.request_id;
    END""",
    """CREATE TABLE peer_audits (
        node_id    TEXT PRIMARY KEY,
        watched    INTEGER NOT NULL,
        agreed     INTEGER NOT NULL,
        failed     INTEGER NOT NULL,
        disproved  INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE ledger_disproofs (
        peer        TEXT NOT NULL,
        request_id  TEXT NOT NULL,
        leg         INTEGER NOT NULL,
        choice      INTEGER NOT NULL,
        at          INTEGER NOT NULL,
        amount      INTEGER NOT NULL CHECK (amount >= 0),
        currency    TEXT NOT NULL,
        signed      BLOB NOT NULL,
        signature   BLOB NOT NULL,
        PRIMARY KEY (peer, request_id, leg, choice)
    ) STRICT""",
    """CREATE TRIGGER ledger_disproofs_are_not_changed BEFORE UPDATE ON ledger_disproofs WHEN 1
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TRIGGER ledger_disproofs_are_not_deleted BEFORE DELETE ON ledger_disproofs
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TRIGGER ledger_disproofs_are_not_replaced BEFORE INSERT ON ledger_disproofs
    WHEN EXISTS (
        SELECT 1 FROM ledger_disproofs WHERE peer = NEW.peer AND request_id = NEW.request_id
            AND leg = NEW.leg AND choice = NEW.choice
    )
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
)
_TO_7 = (*_LOG, *_WITNESSES, *_TRANSCRIPTS_AND_AUDITS)
_TO_8 = ("ALTER TABLE peer_audits ADD COLUMN undecided INTEGER NOT NULL DEFAULT 0",)
# The first: from OLDEST_VERSION to the one after it.
MIGRATIONS: tuple[tuple[str, ...], ...] = (_TO_6, _TO_7, _TO_8)


class Schema(NamedTuple):
    """`script` makes the newest version's tables in an empty file and sets its version;
    `migrations[n]` brings a file of version `oldest + n` to the next."""

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

"""The schema, as numbered steps; `PRAGMA user_version` says how many a file has taken.

A step is never changed once released: a later one mends it.  Times are Unix milliseconds, amounts
are integers in 10^-9 of the currency (see `amount`).
"""

from __future__ import annotations

# "pnvB": tells our files from any other SQLite database.
APPLICATION_ID = 0x706E7642

_V1 = (
    """
    CREATE TABLE keys (
        id            TEXT PRIMARY KEY,
        hash          BLOB NOT NULL UNIQUE,
        prefix        TEXT NOT NULL,
        last_four     TEXT NOT NULL,
        name          TEXT NOT NULL,
        admin         INTEGER NOT NULL,
        created_at    INTEGER NOT NULL,
        expires_at    INTEGER,
        revoked_at    INTEGER,
        last_used_at  INTEGER,
        requests      INTEGER NOT NULL DEFAULT 0,
        tokens        INTEGER NOT NULL DEFAULT 0,
        amount        INTEGER NOT NULL DEFAULT 0
    ) STRICT
    """,
    """
    CREATE TABLE requests (
        request_id         TEXT PRIMARY KEY,
        key_id             TEXT NOT NULL REFERENCES keys (id),
        created_at         INTEGER NOT NULL,
        model              TEXT NOT NULL,
        node_id            TEXT NOT NULL,
        finish_reason      TEXT NOT NULL,
        prompt_tokens      INTEGER NOT NULL,
        cached_tokens      INTEGER NOT NULL,
        completion_tokens  INTEGER NOT NULL,
        amount             INTEGER NOT NULL,
        queue_ms           INTEGER,
        ttft_ms            INTEGER,
        total_ms           INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID
    """,
    "CREATE INDEX requests_by_key ON requests (key_id, created_at)",
    "CREATE INDEX requests_by_time ON requests (created_at)",
    """
    CREATE TABLE receipts (
        request_id  TEXT PRIMARY KEY REFERENCES requests (request_id),
        signed      BLOB NOT NULL,  -- the exact bytes under the signature
        signature   BLOB NOT NULL,
        opening     BLOB NOT NULL   -- JSON: what opens the commitments, for the key's owner
    ) STRICT
    """,
    """
    CREATE TABLE model_files (
        path      TEXT PRIMARY KEY,
        size      INTEGER NOT NULL,
        mtime_ns  INTEGER NOT NULL,
        digest    TEXT NOT NULL
    ) STRICT
    """,
)

_V2 = (
    """
    CREATE TABLE responses (
        id           TEXT PRIMARY KEY,
        key_id       TEXT NOT NULL REFERENCES keys (id),
        previous_id  TEXT,            -- may be deleted: the conversation then begins after it
        created_at   INTEGER NOT NULL,
        input        BLOB NOT NULL,   -- JSON: the items that were asked
        body         BLOB NOT NULL    -- JSON: the answer
    ) STRICT
    """,
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_V1, _V2)
SCHEMA_VERSION = len(MIGRATIONS)

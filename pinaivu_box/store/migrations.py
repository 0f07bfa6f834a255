"""The schema, as numbered steps; `PRAGMA user_version` says how many a file has taken.

A step is never changed once released: a later one mends it.  Times are Unix milliseconds, amounts
are integers in 10^-9 of the currency (see `amount`).
"""

from __future__ import annotations

from pinaivu_box.store.ledger_schema import LEDGER

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

# Tables that change their references are made anew (foreign keys are off while a file migrates).
_V3_KEYS = (
    """
    CREATE TABLE accounts (
        id          TEXT PRIMARY KEY,
        name        TEXT NOT NULL,
        role        TEXT NOT NULL CHECK (role IN ('admin', 'member')),
        password    TEXT,             -- Argon2id, as crypto_pwhash_str writes it
        created_at  INTEGER NOT NULL,
        removed_at  INTEGER           -- its keys, and what they used, stay in the books
    ) STRICT
    """,
    "CREATE UNIQUE INDEX accounts_by_name ON accounts (name) WHERE removed_at IS NULL",
    """
    INSERT INTO accounts (id, name, role, created_at)
    VALUES ('acct_owner', 'owner', 'admin', strftime('%s', 'now') * 1000)
    """,
    # A key that is no admin's had its requests for itself: so it stays.
    """
    INSERT INTO accounts (id, name, role, created_at)
    SELECT 'acct_' || substr(id, 5), id, 'member', created_at FROM keys WHERE NOT admin
    """,
    """
    CREATE TABLE new_keys (
        id            TEXT PRIMARY KEY,
        account_id    TEXT NOT NULL REFERENCES accounts (id),
        hash          BLOB NOT NULL UNIQUE,
        prefix        TEXT NOT NULL,
        last_four     TEXT NOT NULL,
        name          TEXT NOT NULL,
        policy        TEXT NOT NULL,  -- JSON, see pinaivu_box.policy
        created_at    INTEGER NOT NULL,
        expires_at    INTEGER,
        revoked_at    INTEGER,
        blocked       TEXT,           -- why, if it is
        old_hash      BLOB,           -- of the secret before the last rotation,
        old_until     INTEGER,        -- which is good until then
        last_used_at  INTEGER,
        requests      INTEGER NOT NULL DEFAULT 0,
        tokens        INTEGER NOT NULL DEFAULT 0,
        amount        INTEGER NOT NULL DEFAULT 0,
        spent         INTEGER NOT NULL DEFAULT 0,  -- of the budget, in the period that
        spent_since   INTEGER NOT NULL DEFAULT 0   -- began then
    ) STRICT
    """,
    """
    INSERT INTO new_keys (id, account_id, hash, prefix, last_four, name, policy, created_at,
                          expires_at, revoked_at, last_used_at, requests, tokens, amount)
    SELECT id, CASE WHEN admin THEN 'acct_owner' ELSE 'acct_' || substr(id, 5) END,
           hash, prefix, last_four, name,
           CASE WHEN admin THEN '{"scopes":["inference","usage","receipts","admin"]}'
                ELSE '{}' END,
           created_at, expires_at, revoked_at, last_used_at, requests, tokens, amount
    FROM keys
    """,
    "DROP TABLE keys",
    "ALTER TABLE new_keys RENAME TO keys",
    "CREATE INDEX keys_by_old_hash ON keys (old_hash) WHERE old_hash IS NOT NULL",
    "CREATE INDEX keys_by_account ON keys (account_id, id)",
    "CREATE INDEX keys_by_prefix ON keys (prefix)",
)
_V3_OWNERS = (
    """
    CREATE TABLE new_receipts (
        request_id  TEXT PRIMARY KEY,
        key_id      TEXT NOT NULL REFERENCES keys (id),
        created_at  INTEGER NOT NULL,
        signed      BLOB NOT NULL,  -- the exact bytes under the signature
        signature   BLOB NOT NULL,
        opening     BLOB NOT NULL   -- JSON: what opens the commitments, for the key's owner
    ) STRICT
    """,
    """
    INSERT INTO new_receipts
    SELECT request_id, key_id, created_at, signed, signature, opening
    FROM receipts JOIN requests USING (request_id)
    """,
    "DROP TABLE receipts",
    "ALTER TABLE new_receipts RENAME TO receipts",
    "CREATE INDEX receipts_by_time ON receipts (created_at)",
    """
    CREATE TABLE new_responses (
        id           TEXT PRIMARY KEY,
        account_id   TEXT NOT NULL REFERENCES accounts (id),
        previous_id  TEXT,            -- may be deleted: the conversation then begins after it
        created_at   INTEGER NOT NULL,
        input        BLOB NOT NULL,   -- JSON: the items that were asked
        body         BLOB NOT NULL    -- JSON: the answer
    ) STRICT
    """,
    """
    INSERT INTO new_responses
    SELECT responses.id, account_id, previous_id, responses.created_at, input, body
    FROM responses JOIN keys ON keys.id = key_id
    """,
    "DROP TABLE responses",
    "ALTER TABLE new_responses RENAME TO responses",
    "CREATE INDEX responses_by_time ON responses (created_at)",
)
_HOUR = "NEW.created_at - NEW.created_at % 3600000"
_DAY = "NEW.created_at - NEW.created_at % 86400000"
_SUMS = """
    requests = requests + excluded.requests,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    amount = amount + excluded.amount
"""


def _usage_of(key: str) -> str:
    """In the trigger below: adds a new request to the sums of a key, or of the box ('')."""
    return f"""
        INSERT INTO usage VALUES (
            {key}, {_HOUR}, NEW.model, NEW.node_id, 1, NEW.prompt_tokens, NEW.cached_tokens,
            NEW.completion_tokens, NEW.amount
        ) ON CONFLICT DO UPDATE SET {_SUMS};
    """


def _latency_of(key: str, kind: str) -> str:
    return f"""
        INSERT INTO latencies
        SELECT {key}, {_DAY}, NEW.model, NEW.node_id, '{kind}', coalesce(
                   (SELECT min(ms) FROM latency_bounds WHERE ms >= NEW.{kind}_ms),
                   (SELECT max(ms) FROM latency_bounds)
               ), 1
        WHERE NEW.{kind}_ms IS NOT NULL
        ON CONFLICT DO UPDATE SET count = count + 1;
    """


def _into_days(table: str, columns: str, sums: str) -> str:
    """Whoever deletes an hour has added it to its day: sums cannot get lost by rolling up."""
    values = ", ".join(f"OLD.{column}" for column in columns.split(", "))
    day = values.replace("OLD.since", "OLD.since - OLD.since % 86400000")
    return f"""
        CREATE TRIGGER {table}_go_into_days AFTER DELETE ON {table}
        WHEN OLD.since % 86400000 <> 0 BEGIN
            INSERT INTO {table} ({columns}) VALUES ({day}) ON CONFLICT DO UPDATE SET {sums};
        END
    """


_WHOSE = ("NEW.key_id", "(SELECT account_id FROM keys WHERE id = NEW.key_id)", "''")
_V3_USAGE = (
    # Sums by hour, and by day once they are old (since = its midnight, UTC), of each key, each
    # account (by its id) and ('') the whole box: whoever writes a request row has counted it.
    """
    CREATE TABLE usage (
        key_id             TEXT NOT NULL,
        since              INTEGER NOT NULL,
        model              TEXT NOT NULL,
        node_id            TEXT NOT NULL,
        requests           INTEGER NOT NULL,
        prompt_tokens      INTEGER NOT NULL,
        cached_tokens      INTEGER NOT NULL,
        completion_tokens  INTEGER NOT NULL,
        amount             INTEGER NOT NULL,
        PRIMARY KEY (key_id, since, model, node_id)
    ) STRICT, WITHOUT ROWID
    """,
    # How many requests of a day took more than the bound before `ms`, and at most `ms`: by the hour
    # a month of a busy box would be half a million rows.
    """
    CREATE TABLE latencies (
        key_id   TEXT NOT NULL,
        since    INTEGER NOT NULL,
        model    TEXT NOT NULL,
        node_id  TEXT NOT NULL,
        kind     TEXT NOT NULL,   -- ttft, total
        ms       INTEGER NOT NULL,
        count    INTEGER NOT NULL,
        PRIMARY KEY (key_id, since, model, node_id, kind, ms)
    ) STRICT, WITHOUT ROWID
    """,
    # A tenth apart, up to an hour.
    "CREATE TABLE latency_bounds (ms INTEGER PRIMARY KEY) STRICT",
    """
    INSERT INTO latency_bounds
    WITH RECURSIVE bounds (ms) AS (
        SELECT 1 UNION ALL SELECT max(ms + 1, ms * 11 / 10) FROM bounds WHERE ms < 3600000
    )
    SELECT ms FROM bounds
    """,
    # Requests that were answered with an error, by its code.
    """
    CREATE TABLE refusals (
        key_id  TEXT NOT NULL,    -- '' if no key was found
        since   INTEGER NOT NULL,
        model   TEXT NOT NULL,    -- '' if none was found
        code    TEXT NOT NULL,
        count   INTEGER NOT NULL,
        PRIMARY KEY (since, key_id, model, code)
    ) STRICT, WITHOUT ROWID
    """,
    "CREATE INDEX refusals_by_key ON refusals (key_id, since)",
    "CREATE TRIGGER requests_are_counted AFTER INSERT ON requests BEGIN"
    + "".join(_usage_of(whose) for whose in _WHOSE)
    + "".join(_latency_of(whose, kind) for whose in _WHOSE for kind in ("ttft", "total"))
    + "END",
    _into_days(
        "usage",
        "key_id, since, model, node_id, requests, prompt_tokens, cached_tokens,"
        " completion_tokens, amount",
        _SUMS,
    ),
    _into_days("refusals", "key_id, since, model, code, count", "count = count + excluded.count"),
    # What there was before is counted as if it came now.
    "CREATE TABLE old_requests AS SELECT * FROM requests",
    "DELETE FROM requests",
    "INSERT INTO requests SELECT * FROM old_requests",
    "DROP TABLE old_requests",
)
_V3_AUDIT = (
    """
    CREATE TABLE audit (
        id      INTEGER PRIMARY KEY AUTOINCREMENT,
        at      INTEGER NOT NULL,
        actor   TEXT NOT NULL,    -- a key's id, or cli:USER
        source  TEXT NOT NULL,    -- an IP address, or local
        action  TEXT NOT NULL,    -- such as key.create
        target  TEXT NOT NULL,    -- an id
        detail  TEXT NOT NULL     -- JSON: what was set, never a secret
    ) STRICT
    """,
    "CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit"
    " BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END",
    "CREATE TRIGGER audit_is_not_deleted BEFORE DELETE ON audit"
    " BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END",
    # INSERT OR REPLACE asks no trigger of deletions.
    "CREATE TRIGGER audit_is_not_replaced BEFORE INSERT ON audit"
    " WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id)"
    " BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END",
)

_V3_PEERS = (
    # The network that this box belongs to, if any, and its roster's records as they were signed.
    """
    CREATE TABLE network (
        id         INTEGER PRIMARY KEY CHECK (id = 1),
        network    TEXT NOT NULL,     -- net_...
        joined_at  INTEGER NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE roster (
        id         BLOB PRIMARY KEY,
        kind       TEXT NOT NULL,     -- member, revocation
        body       BLOB NOT NULL,
        signature  BLOB NOT NULL,
        stored_at  INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID
    """,
    # Tickets that this box gave, by the hash of their secret, and who used them.
    """
    CREATE TABLE tickets (
        secret_sha256  TEXT PRIMARY KEY,
        name           TEXT,          -- of the newcomer; NULL: as it calls itself
        created_at     INTEGER NOT NULL,
        expires_at     INTEGER NOT NULL,
        uses           INTEGER NOT NULL,
        admin          INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE ticket_uses (
        secret_sha256  TEXT NOT NULL REFERENCES tickets ON DELETE CASCADE,
        node_id        TEXT NOT NULL,
        used_at        INTEGER NOT NULL,
        PRIMARY KEY (secret_sha256, node_id)
    ) STRICT, WITHOUT ROWID
    """,
    # What this box alone knows of others, whatever network they were met in.
    """
    CREATE TABLE peers (
        node_id     TEXT PRIMARY KEY,
        name        TEXT NOT NULL DEFAULT '',    -- what we call it; '': as its certificate does
        addresses   TEXT NOT NULL DEFAULT '[]',  -- JSON, where it answered last comes first
        first_seen  INTEGER,
        last_seen   INTEGER,
        policy      TEXT NOT NULL DEFAULT '{}'   -- JSON: other limits than [peering.serve]
    ) STRICT, WITHOUT ROWID
    """,
    # What it thinks of them: numbers as they were at `at` (Unix seconds), for they fade.
    """
    CREATE TABLE peer_opinions (
        node_id   TEXT PRIMARY KEY,
        served    REAL NOT NULL,
        failed    REAL NOT NULL,
        speed     REAL NOT NULL,
        disputes  REAL NOT NULL,
        at        REAL NOT NULL,
        last      TEXT NOT NULL
    ) STRICT, WITHOUT ROWID
    """,
)

_V3_PIECES = (
    # SHA-256 of each 4 MiB of a model file, for those who copy it.
    """
    CREATE TABLE model_pieces (
        digest  TEXT PRIMARY KEY,  -- of the whole
        hashes  BLOB NOT NULL
    ) STRICT
    """,
)

_V3 = (*_V3_KEYS, *_V3_OWNERS, *_V3_USAGE, *_V3_AUDIT, *_V3_PEERS, *_V3_PIECES, *LEDGER)

_V4_RECEIPTS = (
    "CREATE INDEX keys_by_name ON keys (name)",
    # For lists of receipts, which outlive the rows of their requests.
    "ALTER TABLE receipts ADD COLUMN account_id TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE receipts ADD COLUMN model TEXT NOT NULL DEFAULT ''",
    """
    UPDATE receipts SET
        account_id = (SELECT account_id FROM keys WHERE id = key_id),
        model = coalesce(
            (SELECT model FROM requests WHERE requests.request_id = receipts.request_id),
            CASE WHEN json_valid(CAST(signed AS TEXT))
                 THEN json_extract(CAST(signed AS TEXT), '$.model') END,
            ''
        )
    """,
    # A page is read in the order of the ids, which is that of time; the model is in the index, so
    # that receipts of other models are passed over without being read.
    "CREATE INDEX receipts_by_account ON receipts (account_id, request_id, model)",
    "CREATE INDEX receipts_by_key ON receipts (key_id, request_id, model)",
    "CREATE INDEX receipts_by_model ON receipts (model, request_id)",
)

_V4_CLOCK = (
    # What keys spent in other periods of their budgets than the one they were charged in last: a
    # clock that was wrong for a while comes back to the period that it had left.
    """
    CREATE TABLE spent_before (
        id      INTEGER PRIMARY KEY,  -- the highest was the last one
        key_id  TEXT NOT NULL REFERENCES keys (id),
        since   INTEGER NOT NULL,
        spent   INTEGER NOT NULL,
        UNIQUE (key_id, since)
    ) STRICT
    """,
    """
    CREATE TRIGGER periods_are_put_by AFTER UPDATE OF spent_since ON keys
    WHEN NEW.spent_since <> OLD.spent_since BEGIN
        INSERT OR REPLACE INTO spent_before (key_id, since, spent)
        VALUES (OLD.id, OLD.spent_since, OLD.spent);
        DELETE FROM spent_before WHERE key_id = OLD.id AND id NOT IN (
            SELECT id FROM spent_before WHERE key_id = OLD.id ORDER BY id DESC LIMIT 32
        );
    END
    """,
    # What retention goes by, so that a clock that is wrong for a while deletes nothing: when it
    # looked last, up to when it believes the clock, since when it does not, and to when the clock
    # was set back last.  One row.
    """
    CREATE TABLE clock (
        id        INTEGER PRIMARY KEY,
        seen      INTEGER NOT NULL,
        believed  INTEGER NOT NULL,
        doubted   INTEGER,
        behind    INTEGER
    ) STRICT
    """,
    # How many revocations there were when a ticket was made: their times would compare clocks.
    "ALTER TABLE tickets ADD COLUMN revocations INTEGER NOT NULL DEFAULT 0",
    """
    UPDATE tickets SET revocations = (
        SELECT count(*) FROM roster WHERE kind = 'revocation' AND stored_at < created_at
    )
    """,
)

_RESPONSES_COUNTED = (
    "CREATE INDEX responses_by_key ON responses (stored_by, created_at, bytes)",
    """
    CREATE TRIGGER responses_are_counted AFTER INSERT ON responses BEGIN
        INSERT INTO response_sums VALUES (NEW.stored_by, 1, NEW.bytes) ON CONFLICT DO UPDATE SET
            count = count + excluded.count, bytes = bytes + excluded.bytes;
    END
    """,
    """
    CREATE TRIGGER responses_are_discounted AFTER DELETE ON responses BEGIN
        UPDATE response_sums SET count = count - 1, bytes = bytes - OLD.bytes
        WHERE key_id = OLD.stored_by;
    END
    """,
)
_V4_RESPONSES = (
    # Whose key has stored a response, and how much a key has: sums by the triggers below.
    "ALTER TABLE responses ADD COLUMN stored_by TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE responses ADD COLUMN"
    " bytes INTEGER GENERATED ALWAYS AS (length(input) + length(body)) VIRTUAL",
    """
    CREATE TABLE response_sums (
        key_id  TEXT PRIMARY KEY,
        count   INTEGER NOT NULL DEFAULT 0,
        bytes   INTEGER NOT NULL DEFAULT 0
    ) STRICT, WITHOUT ROWID
    """,
    "INSERT INTO response_sums SELECT stored_by, count(*), sum(bytes) FROM responses GROUP BY 1",
    *_RESPONSES_COUNTED,
    "CREATE INDEX responses_by_previous ON responses (previous_id) WHERE previous_id IS NOT NULL",
    # Written to see whether anything can be written.
    "CREATE TABLE probe (id INTEGER PRIMARY KEY, filler BLOB NOT NULL) STRICT",
)

_V4 = (*_V4_CLOCK, *_V4_RESPONSES, *_V4_RECEIPTS)

_V5 = (
    # Responses that run without their client: `status` is "queued" until they have ended, and
    # `events` (zlib) is then what their stream was.
    "DROP INDEX responses_by_key",
    "DROP TRIGGER responses_are_counted",
    "DROP TRIGGER responses_are_discounted",
    "ALTER TABLE responses DROP COLUMN bytes",
    "ALTER TABLE responses ADD COLUMN status TEXT NOT NULL DEFAULT 'completed'",
    "ALTER TABLE responses ADD COLUMN events BLOB",
    "ALTER TABLE responses ADD COLUMN bytes INTEGER GENERATED ALWAYS AS"
    " (length(input) + length(body) + coalesce(length(events), 0)) VIRTUAL",
    """
    UPDATE responses SET status = json_extract(CAST(body AS TEXT), '$.status')
    WHERE json_valid(CAST(body AS TEXT))
      AND json_extract(CAST(body AS TEXT), '$.status') IS NOT NULL
    """,
    *_RESPONSES_COUNTED,
    """
    CREATE TRIGGER responses_are_counted_anew AFTER UPDATE OF body, events ON responses BEGIN
        UPDATE response_sums SET bytes = bytes - OLD.bytes + NEW.bytes
        WHERE key_id = NEW.stored_by;
    END
    """,
    "CREATE INDEX responses_that_run ON responses (status) WHERE status = 'queued'",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_V1, _V2, _V3, _V4, _V5)
SCHEMA_VERSION = len(MIGRATIONS)

-- The schema of the database file.  Times are Unix milliseconds, amounts integers in 10^-9 of the
-- currency (see pinaivu_box.amount).  A file says in `user_version` which version it has; how one
-- of an earlier version is brought to this one is in schema.py.

-- Accounts and keys

CREATE TABLE accounts (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL,
    role        TEXT NOT NULL CHECK (role IN ('admin', 'member')),
    password    TEXT,             -- Argon2id, as crypto_pwhash_str writes it
    created_at  INTEGER NOT NULL,
    removed_at  INTEGER,          -- its keys and their usage are kept
    pages_key   TEXT              -- the id of the key that its sessions use; NULL before the first
) STRICT;
CREATE UNIQUE INDEX accounts_by_name ON accounts (name) WHERE removed_at IS NULL;
INSERT INTO accounts (id, name, role, created_at)
VALUES ('acct_owner', 'owner', 'admin', strftime('%s', 'now') * 1000);

CREATE TABLE keys (
    id            TEXT PRIMARY KEY,
    account_id    TEXT NOT NULL REFERENCES accounts (id),
    hash          BLOB NOT NULL UNIQUE,        -- SHA-256 of the secret
    prefix        TEXT NOT NULL,               -- of the secret, for lists
    last_four     TEXT NOT NULL,
    name          TEXT NOT NULL,
    policy        TEXT NOT NULL,               -- JSON, see pinaivu_box.policy
    created_at    INTEGER NOT NULL,
    expires_at    INTEGER,
    revoked_at    INTEGER,
    blocked       TEXT,                        -- the reason, if it is blocked
    old_hash      BLOB,                        -- of the secret before the last rotation,
    old_until     INTEGER,                     -- which is accepted until then
    last_used_at  INTEGER,
    requests      INTEGER NOT NULL DEFAULT 0,
    tokens        INTEGER NOT NULL DEFAULT 0,
    amount        INTEGER NOT NULL DEFAULT 0,
    spent         INTEGER NOT NULL DEFAULT 0,  -- of the budget, in the period that
    spent_since   INTEGER NOT NULL DEFAULT 0,  -- began then
    transcript_key  BLOB                       -- X25519: the public half that is made of the secret
) STRICT;
CREATE INDEX keys_by_old_hash ON keys (old_hash) WHERE old_hash IS NOT NULL;
CREATE INDEX keys_by_account ON keys (account_id, id);
CREATE INDEX keys_by_prefix ON keys (prefix);
CREATE INDEX keys_by_name ON keys (name);

-- What keys spent in other periods of their budgets than the one that they were charged in last:
-- a clock that was wrong for a while returns to the period that it had left.
CREATE TABLE spent_before (
    id      INTEGER PRIMARY KEY,  -- the highest is the latest
    key_id  TEXT NOT NULL REFERENCES keys (id),
    since   INTEGER NOT NULL,
    spent   INTEGER NOT NULL,
    UNIQUE (key_id, since)
) STRICT;
CREATE TRIGGER periods_are_put_by AFTER UPDATE OF spent_since ON keys
WHEN NEW.spent_since <> OLD.spent_since BEGIN
    INSERT OR REPLACE INTO spent_before (key_id, since, spent)
    VALUES (OLD.id, OLD.spent_since, OLD.spent);
    DELETE FROM spent_before WHERE key_id = OLD.id AND id NOT IN (
        SELECT id FROM spent_before WHERE key_id = OLD.id ORDER BY id DESC LIMIT 32
    );
END;

CREATE TABLE sessions (
    id          TEXT PRIMARY KEY,
    account_id  TEXT NOT NULL REFERENCES accounts (id),
    token_hash  BLOB NOT NULL UNIQUE,  -- SHA-256 of what the browser's cookie holds
    csrf        TEXT NOT NULL,         -- what its requests that change something have to send
    created_at  INTEGER NOT NULL,
    last_seen   INTEGER NOT NULL,
    address     TEXT NOT NULL,         -- an IP address
    user_agent  TEXT NOT NULL
) STRICT;
CREATE INDEX sessions_by_account ON sessions (account_id, created_at);

-- One-time links: they set the password of an account, or invite somebody to sign up.
CREATE TABLE login_links (
    id          TEXT PRIMARY KEY,
    token_hash  BLOB NOT NULL UNIQUE,  -- SHA-256 of what the link holds
    account_id  TEXT REFERENCES accounts (id),  -- NULL: an invitation
    created_by  TEXT NOT NULL,         -- as the actors of the audit trail
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER NOT NULL
) STRICT;

-- Who at a provider of single sign-on an account belongs to.
CREATE TABLE account_identities (
    issuer      TEXT NOT NULL,
    subject     TEXT NOT NULL,  -- the provider's name for the person, for ever
    account_id  TEXT NOT NULL REFERENCES accounts (id),
    linked_at   INTEGER NOT NULL,
    PRIMARY KEY (issuer, subject)
) STRICT, WITHOUT ROWID;
CREATE INDEX account_identities_by_account ON account_identities (account_id);

CREATE TABLE audit (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    at      INTEGER NOT NULL,
    actor   TEXT NOT NULL,  -- a key's id, or cli:USER
    source  TEXT NOT NULL,  -- an IP address, or local
    action  TEXT NOT NULL,  -- such as key.create
    target  TEXT NOT NULL,  -- an id
    detail  TEXT NOT NULL   -- JSON: what was set, never a secret
) STRICT;
CREATE INDEX audit_by_target ON audit (target, id);
CREATE INDEX audit_by_actor ON audit (actor, id);
-- An erased account loses its name in it, and nothing else changes (see store/audit.py).
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit
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
BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END;
CREATE TRIGGER audit_is_not_deleted BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END;
-- INSERT OR REPLACE does not fire triggers of deletions.
CREATE TRIGGER audit_is_not_replaced BEFORE INSERT ON audit
WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END;

-- Requests, receipts and stored responses

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
) STRICT, WITHOUT ROWID;
CREATE INDEX requests_by_key ON requests (key_id, created_at);
CREATE INDEX requests_by_time ON requests (created_at);

CREATE TABLE receipts (
    request_id  TEXT PRIMARY KEY,
    key_id      TEXT NOT NULL REFERENCES keys (id),
    created_at  INTEGER NOT NULL,
    signed      BLOB NOT NULL,            -- the exact bytes under the signature
    signature   BLOB NOT NULL,
    opening     BLOB NOT NULL,            -- JSON: opens the commitments, for the key's owner
    account_id  TEXT NOT NULL DEFAULT '', -- for lists of receipts, which outlive
    model       TEXT NOT NULL DEFAULT '', -- the rows of their requests
    log_entry   INTEGER                   -- the id of its entry in the log
) STRICT;
CREATE UNIQUE INDEX receipts_by_entry ON receipts (log_entry) WHERE log_entry IS NOT NULL;
CREATE INDEX receipts_without_entry ON receipts (created_at) WHERE log_entry IS NULL;
CREATE INDEX receipts_by_time ON receipts (created_at);
-- A page is read in the order of the ids, which is that of time; with the model in the index,
-- receipts of other models are skipped without being read.
CREATE INDEX receipts_by_account ON receipts (account_id, request_id, model);
CREATE INDEX receipts_by_key ON receipts (key_id, request_id, model);
CREATE INDEX receipts_by_model ON receipts (model, request_id);

CREATE TABLE responses (
    id           TEXT PRIMARY KEY,
    account_id   TEXT NOT NULL REFERENCES accounts (id),
    previous_id  TEXT,                                -- may be deleted: then it begins here
    created_at   INTEGER NOT NULL,
    input        BLOB NOT NULL,                       -- JSON: the items that were sent
    body         BLOB NOT NULL,                       -- JSON: the answer
    stored_by    TEXT NOT NULL DEFAULT '',            -- a key's id
    status       TEXT NOT NULL DEFAULT 'completed',   -- queued until it has ended
    events       BLOB,                                -- zlib: of a background response's stream
    bytes        INTEGER GENERATED ALWAYS AS
                 (length(input) + length(body) + coalesce(length(events), 0)) VIRTUAL
) STRICT;
CREATE INDEX responses_by_time ON responses (created_at);
CREATE INDEX responses_by_key ON responses (stored_by, created_at, bytes);
CREATE INDEX responses_by_previous ON responses (previous_id) WHERE previous_id IS NOT NULL;
CREATE INDEX responses_that_run ON responses (status) WHERE status = 'queued';

-- How much each key has stored.
CREATE TABLE response_sums (
    key_id  TEXT PRIMARY KEY,
    count   INTEGER NOT NULL DEFAULT 0,
    bytes   INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE TRIGGER responses_are_counted AFTER INSERT ON responses BEGIN
    INSERT INTO response_sums VALUES (NEW.stored_by, 1, NEW.bytes) ON CONFLICT DO UPDATE SET
        count = count + excluded.count, bytes = bytes + excluded.bytes;
END;
CREATE TRIGGER responses_are_discounted AFTER DELETE ON responses BEGIN
    UPDATE response_sums SET count = count - 1, bytes = bytes - OLD.bytes
    WHERE key_id = OLD.stored_by;
END;
CREATE TRIGGER responses_are_counted_anew AFTER UPDATE OF body, events ON responses BEGIN
    UPDATE response_sums SET bytes = bytes - OLD.bytes + NEW.bytes
    WHERE key_id = NEW.stored_by;
END;

-- Usage

-- Sums by hour, and by day once they are old (since = its midnight, UTC), of each key, each account
-- (by its id) and ('') the whole box.  A trigger adds each request, so no writer can forget to.
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
) STRICT, WITHOUT ROWID;

-- How many requests of a day took more than the bound before `ms`, and at most `ms`.  By the hour,
-- a month of a busy box would be half a million rows.
CREATE TABLE latencies (
    key_id   TEXT NOT NULL,
    since    INTEGER NOT NULL,
    model    TEXT NOT NULL,
    node_id  TEXT NOT NULL,
    kind     TEXT NOT NULL,  -- ttft, total
    ms       INTEGER NOT NULL,
    count    INTEGER NOT NULL,
    PRIMARY KEY (key_id, since, model, node_id, kind, ms)
) STRICT, WITHOUT ROWID;

-- The same of the whole box by the hour.
CREATE TABLE latencies_by_hour (
    since  INTEGER NOT NULL,
    kind   TEXT NOT NULL,
    ms     INTEGER NOT NULL,
    count  INTEGER NOT NULL,
    PRIMARY KEY (since, kind, ms)
) STRICT, WITHOUT ROWID;

-- A tenth apart, up to an hour.
CREATE TABLE latency_bounds (ms INTEGER PRIMARY KEY) STRICT;
INSERT INTO latency_bounds
WITH RECURSIVE bounds (ms) AS (
    SELECT 1 UNION ALL SELECT max(ms + 1, ms * 11 / 10) FROM bounds WHERE ms < 3600000
)
SELECT ms FROM bounds;

-- Requests that were answered with an error, by its code.
CREATE TABLE refusals (
    key_id  TEXT NOT NULL,  -- '' if there was no valid key
    since   INTEGER NOT NULL,
    model   TEXT NOT NULL,  -- '' if there was no known model
    code    TEXT NOT NULL,
    count   INTEGER NOT NULL,
    PRIMARY KEY (since, key_id, model, code)
) STRICT, WITHOUT ROWID;
CREATE INDEX refusals_by_key ON refusals (key_id, since);

CREATE TRIGGER requests_are_counted AFTER INSERT ON requests BEGIN
    INSERT INTO usage VALUES (
        NEW.key_id, NEW.created_at - NEW.created_at % 3600000,
        NEW.model, NEW.node_id, 1, NEW.prompt_tokens, NEW.cached_tokens, NEW.completion_tokens,
        NEW.amount
    ) ON CONFLICT DO UPDATE SET
        requests = requests + excluded.requests,
        prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        cached_tokens = cached_tokens + excluded.cached_tokens,
        completion_tokens = completion_tokens + excluded.completion_tokens,
        amount = amount + excluded.amount;
    INSERT INTO usage VALUES (
        (SELECT account_id FROM keys WHERE id = NEW.key_id),
        NEW.created_at - NEW.created_at % 3600000,
        NEW.model, NEW.node_id, 1, NEW.prompt_tokens, NEW.cached_tokens, NEW.completion_tokens,
        NEW.amount
    ) ON CONFLICT DO UPDATE SET
        requests = requests + excluded.requests,
        prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        cached_tokens = cached_tokens + excluded.cached_tokens,
        completion_tokens = completion_tokens + excluded.completion_tokens,
        amount = amount + excluded.amount;
    INSERT INTO usage VALUES (
        '', NEW.created_at - NEW.created_at % 3600000,
        NEW.model, NEW.node_id, 1, NEW.prompt_tokens, NEW.cached_tokens, NEW.completion_tokens,
        NEW.amount
    ) ON CONFLICT DO UPDATE SET
        requests = requests + excluded.requests,
        prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        cached_tokens = cached_tokens + excluded.cached_tokens,
        completion_tokens = completion_tokens + excluded.completion_tokens,
        amount = amount + excluded.amount;
    INSERT INTO latencies
    SELECT NEW.key_id, NEW.created_at - NEW.created_at % 86400000,
           NEW.model, NEW.node_id, 'ttft', coalesce(
               (SELECT min(ms) FROM latency_bounds WHERE ms >= NEW.ttft_ms),
               (SELECT max(ms) FROM latency_bounds)
           ), 1
    WHERE NEW.ttft_ms IS NOT NULL
    ON CONFLICT DO UPDATE SET count = count + 1;
    INSERT INTO latencies
    SELECT NEW.key_id, NEW.created_at - NEW.created_at % 86400000,
           NEW.model, NEW.node_id, 'total', coalesce(
               (SELECT min(ms) FROM latency_bounds WHERE ms >= NEW.total_ms),
               (SELECT max(ms) FROM latency_bounds)
           ), 1
    WHERE NEW.total_ms IS NOT NULL
    ON CONFLICT DO UPDATE SET count = count + 1;
    INSERT INTO latencies
    SELECT (SELECT account_id FROM keys WHERE id = NEW.key_id),
           NEW.created_at - NEW.created_at % 86400000,
           NEW.model, NEW.node_id, 'ttft', coalesce(
               (SELECT min(ms) FROM latency_bounds WHERE ms >= NEW.ttft_ms),
               (SELECT max(ms) FROM latency_bounds)
           ), 1
    WHERE NEW.ttft_ms IS NOT NULL
    ON CONFLICT DO UPDATE SET count = count + 1;
    INSERT INTO latencies
    SELECT (SELECT account_id FROM keys WHERE id = NEW.key_id),
           NEW.created_at - NEW.created_at % 86400000,
           NEW.model, NEW.node_id, 'total', coalesce(
               (SELECT min(ms) FROM latency_bounds WHERE ms >= NEW.total_ms),
               (SELECT max(ms) FROM latency_bounds)
           ), 1
    WHERE NEW.total_ms IS NOT NULL
    ON CONFLICT DO UPDATE SET count = count + 1;
    INSERT INTO latencies
    SELECT '', NEW.created_at - NEW.created_at % 86400000,
           NEW.model, NEW.node_id, 'ttft', coalesce(
               (SELECT min(ms) FROM latency_bounds WHERE ms >= NEW.ttft_ms),
               (SELECT max(ms) FROM latency_bounds)
           ), 1
    WHERE NEW.ttft_ms IS NOT NULL
    ON CONFLICT DO UPDATE SET count = count + 1;
    INSERT INTO latencies
    SELECT '', NEW.created_at - NEW.created_at % 86400000,
           NEW.model, NEW.node_id, 'total', coalesce(
               (SELECT min(ms) FROM latency_bounds WHERE ms >= NEW.total_ms),
               (SELECT max(ms) FROM latency_bounds)
           ), 1
    WHERE NEW.total_ms IS NOT NULL
    ON CONFLICT DO UPDATE SET count = count + 1;
END;

CREATE TRIGGER requests_are_timed AFTER INSERT ON requests BEGIN
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
END;

-- Whoever deletes an hour has added it to its day: rolling up cannot lose sums.
CREATE TRIGGER usage_go_into_days AFTER DELETE ON usage
WHEN OLD.since % 86400000 <> 0 BEGIN
    INSERT INTO usage (
        key_id, since, model, node_id, requests, prompt_tokens, cached_tokens, completion_tokens,
        amount
    ) VALUES (
        OLD.key_id, OLD.since - OLD.since % 86400000, OLD.model, OLD.node_id, OLD.requests,
        OLD.prompt_tokens, OLD.cached_tokens, OLD.completion_tokens, OLD.amount
    ) ON CONFLICT DO UPDATE SET
        requests = requests + excluded.requests,
        prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        cached_tokens = cached_tokens + excluded.cached_tokens,
        completion_tokens = completion_tokens + excluded.completion_tokens,
        amount = amount + excluded.amount;
END;
CREATE TRIGGER refusals_go_into_days AFTER DELETE ON refusals
WHEN OLD.since % 86400000 <> 0 BEGIN
    INSERT INTO refusals (key_id, since, model, code, count)
    VALUES (OLD.key_id, OLD.since - OLD.since % 86400000, OLD.model, OLD.code, OLD.count)
    ON CONFLICT DO UPDATE SET count = count + excluded.count;
END;

-- Chats.  `sealed` and `vector` are encrypted (see pinaivu_box.chats.sealing).

-- What wraps the data key of an account, by kind: password, former (the password before one that was
-- set without it), passphrase, recovery; or none, with the key itself.
CREATE TABLE account_secrets (
    account_id  TEXT NOT NULL REFERENCES accounts (id),
    kind        TEXT NOT NULL,
    salt        BLOB NOT NULL,
    ops_limit   INTEGER NOT NULL,  -- of Argon2id
    mem_limit   INTEGER NOT NULL,
    wrapped     BLOB NOT NULL,
    created_at  INTEGER NOT NULL,
    PRIMARY KEY (account_id, kind)
) STRICT, WITHOUT ROWID;

CREATE TABLE conversations (
    id          TEXT PRIMARY KEY,
    account_id  TEXT NOT NULL REFERENCES accounts (id),
    created_at  INTEGER NOT NULL,
    updated_at  INTEGER NOT NULL,
    sealed      BLOB NOT NULL
) STRICT;
CREATE INDEX conversations_by_time ON conversations (account_id, updated_at, id);

CREATE TABLE messages (
    id               TEXT PRIMARY KEY,
    conversation_id  TEXT NOT NULL REFERENCES conversations (id),
    account_id       TEXT NOT NULL REFERENCES accounts (id),
    parent_id        TEXT,  -- NULL: it begins the conversation
    created_at       INTEGER NOT NULL,
    sealed           BLOB NOT NULL,
    bytes            INTEGER NOT NULL  -- of `sealed`
) STRICT;
CREATE INDEX messages_by_conversation ON messages (conversation_id, created_at, id, bytes);
CREATE INDEX messages_by_account ON messages (account_id);

-- What an account has, so that its room is checked without reading all.  Kept by triggers.
CREATE TABLE chat_sums (
    account_id     TEXT PRIMARY KEY,
    conversations  INTEGER NOT NULL DEFAULT 0,
    bytes          INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE TRIGGER conversations_are_counted AFTER INSERT ON conversations BEGIN
    INSERT INTO chat_sums VALUES (NEW.account_id, 1, 0)
    ON CONFLICT DO UPDATE SET conversations = conversations + 1;
END;
CREATE TRIGGER conversations_are_discounted AFTER DELETE ON conversations BEGIN
    UPDATE chat_sums SET conversations = conversations - 1 WHERE account_id = OLD.account_id;
END;
CREATE TRIGGER messages_are_counted AFTER INSERT ON messages BEGIN
    INSERT INTO chat_sums VALUES (NEW.account_id, 0, NEW.bytes)
    ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes;
END;
CREATE TRIGGER messages_are_discounted AFTER DELETE ON messages BEGIN
    UPDATE chat_sums SET bytes = bytes - OLD.bytes WHERE account_id = OLD.account_id;
END;
CREATE TRIGGER messages_are_counted_anew AFTER UPDATE OF bytes ON messages BEGIN
    UPDATE chat_sums SET bytes = bytes - OLD.bytes + NEW.bytes
    WHERE account_id = NEW.account_id;
END;

CREATE TABLE memories (
    id          TEXT PRIMARY KEY,
    account_id  TEXT NOT NULL REFERENCES accounts (id),
    created_at  INTEGER NOT NULL,
    updated_at  INTEGER NOT NULL,
    sealed      BLOB NOT NULL,
    vector      BLOB NOT NULL  -- empty until there is one
) STRICT;
CREATE INDEX memories_by_account ON memories (account_id, created_at);

CREATE TABLE chat_settings (
    account_id  TEXT PRIMARY KEY REFERENCES accounts (id),
    sealed      BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- What retention goes by, so that a clock that is wrong for a while deletes nothing: when it looked
-- last, up to when it trusts the clock, since when it does not, and to when the clock was set back
-- last.  One row.
CREATE TABLE clock (
    id        INTEGER PRIMARY KEY,
    seen      INTEGER NOT NULL,
    believed  INTEGER NOT NULL,
    doubted   INTEGER,
    behind    INTEGER
) STRICT;

-- Written to find out whether anything can be written.
CREATE TABLE probe (id INTEGER PRIMARY KEY, filler BLOB NOT NULL) STRICT;

-- What went wrong, and when this box ran; kept for 90 days (store/incidents.py)

CREATE TABLE incidents (
    id        TEXT PRIMARY KEY,
    kind      TEXT NOT NULL CHECK (kind IN ('engine', 'peer', 'errors')),
    subject   TEXT NOT NULL,  -- a model's id, a peer's node id, or nothing
    began_at  INTEGER NOT NULL,
    ended_at  INTEGER,        -- NULL: it goes on
    detail    TEXT NOT NULL
) STRICT;
CREATE INDEX incidents_by_time ON incidents (began_at);

CREATE TABLE runs (
    id        INTEGER PRIMARY KEY,
    began_at  INTEGER NOT NULL,
    seen_at   INTEGER NOT NULL  -- it ran at least until then
) STRICT;

-- Model files

CREATE TABLE model_files (
    path      TEXT PRIMARY KEY,
    size      INTEGER NOT NULL,
    mtime_ns  INTEGER NOT NULL,
    digest    TEXT NOT NULL
) STRICT;

-- SHA-256 of each 4 MiB of a model file, for boxes that copy it.
CREATE TABLE model_pieces (
    digest  TEXT PRIMARY KEY,  -- of the whole file
    hashes  BLOB NOT NULL
) STRICT;

-- The network and its members

-- The network that this box belongs to, if any.  One row.
CREATE TABLE network (
    id         INTEGER PRIMARY KEY CHECK (id = 1),
    network    TEXT NOT NULL,  -- net_...
    joined_at  INTEGER NOT NULL
) STRICT;

-- The roster's records as they were signed.
CREATE TABLE roster (
    id         BLOB PRIMARY KEY,
    kind       TEXT NOT NULL,  -- member, revocation
    body       BLOB NOT NULL,
    signature  BLOB NOT NULL,
    stored_at  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Tickets that this box issued, by the hash of their secret, and who used them.
CREATE TABLE tickets (
    secret_sha256  TEXT PRIMARY KEY,
    name           TEXT,                       -- of the newcomer; NULL: the one that it chooses
    created_at     INTEGER NOT NULL,
    expires_at     INTEGER NOT NULL,           -- Unix seconds
    uses           INTEGER NOT NULL,
    admin          INTEGER NOT NULL,
    revocations    INTEGER NOT NULL DEFAULT 0  -- in the roster when it was made: their times would
                                               -- compare clocks
) STRICT, WITHOUT ROWID;
CREATE TABLE ticket_uses (
    secret_sha256  TEXT NOT NULL REFERENCES tickets ON DELETE CASCADE,
    node_id        TEXT NOT NULL,
    used_at        INTEGER NOT NULL,
    PRIMARY KEY (secret_sha256, node_id)
) STRICT, WITHOUT ROWID;

-- What this box alone knows of others, whatever network they were met in.
CREATE TABLE peers (
    node_id     TEXT PRIMARY KEY,
    name        TEXT NOT NULL DEFAULT '',    -- here; '': as in its certificate
    addresses   TEXT NOT NULL DEFAULT '[]',  -- JSON, the one that answered last comes first
    first_seen  INTEGER,
    last_seen   INTEGER,
    policy      TEXT NOT NULL DEFAULT '{}'   -- JSON: limits instead of those of [peering.serve]
) STRICT, WITHOUT ROWID;

-- Their reputation: numbers as they were at `at` (Unix seconds), for they fade.
CREATE TABLE peer_opinions (
    node_id   TEXT PRIMARY KEY,
    served    REAL NOT NULL,
    failed    REAL NOT NULL,
    speed     REAL NOT NULL,
    disputes  REAL NOT NULL,
    at        REAL NOT NULL,
    last      TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- The ledger: what boxes owe each other.  Nothing is deleted or replaced.

-- One leg of one choice, served to a peer or by it.  Two things come later, each once: the
-- coordinator's signature, without which it counts for nobody, and the statement that it is in.
-- What never gets the first may be written off, once.
CREATE TABLE ledger_entries (
    peer          TEXT NOT NULL,
    served_by_us  INTEGER NOT NULL,
    request_id    TEXT NOT NULL,
    leg           INTEGER NOT NULL,
    choice        INTEGER NOT NULL,
    prompt        INTEGER NOT NULL,
    prompt_paid   INTEGER NOT NULL,  -- whether the amount includes the prompt's price
    amount        INTEGER NOT NULL CHECK (amount >= 0),
    currency      TEXT NOT NULL,
    at            INTEGER NOT NULL,
    proof         BLOB NOT NULL,     -- the exact bytes under both signatures
    proof_sha256  BLOB NOT NULL,     -- of them: boxes compare entries by the thousands
    signature     BLOB NOT NULL,     -- of the serving box
    acceptance    BLOB NOT NULL,     -- of the coordinator; empty until it has come
    statement     TEXT REFERENCES ledger_statements (id) DEFERRABLE INITIALLY DEFERRED,
    disputed      TEXT,              -- why the peer does not accept what we served it
    forgiven_at   INTEGER,           -- when we wrote that off
    PRIMARY KEY (peer, served_by_us, request_id, leg, choice)
) STRICT;
-- Choices share their prompt and pay for it once.
CREATE UNIQUE INDEX ledger_prompts ON ledger_entries (peer, served_by_us, request_id, prompt)
WHERE prompt_paid AND acceptance <> x'';
CREATE INDEX ledger_open ON ledger_entries (peer, request_id) WHERE statement IS NULL;
CREATE INDEX ledger_waiting ON ledger_entries (peer) WHERE acceptance = x'';
CREATE INDEX ledger_by_statement ON ledger_entries (statement) WHERE statement IS NOT NULL;

CREATE TABLE ledger_statements (
    id        TEXT PRIMARY KEY,
    peer      TEXT NOT NULL,
    sequence  INTEGER NOT NULL,  -- 1, 2, ... with that peer
    at        INTEGER NOT NULL,
    signed    BLOB NOT NULL,     -- the exact bytes under both signatures
    ours      BLOB NOT NULL,
    theirs    BLOB NOT NULL,
    UNIQUE (peer, sequence)
) STRICT;

-- This side's operator says that what a statement left over was paid.
CREATE TABLE ledger_paid (
    statement  TEXT PRIMARY KEY REFERENCES ledger_statements (id),
    at         INTEGER NOT NULL
) STRICT;

-- Sums of the entries, kept by the triggers below.
CREATE TABLE ledger_balances (
    peer           TEXT NOT NULL,
    currency       TEXT NOT NULL,
    served         INTEGER NOT NULL DEFAULT 0,  -- by us, ever
    received       INTEGER NOT NULL DEFAULT 0,  -- from it, ever
    open_served    INTEGER NOT NULL DEFAULT 0,  -- in no statement yet
    open_received  INTEGER NOT NULL DEFAULT 0,
    carried        INTEGER NOT NULL DEFAULT 0,  -- owed to us by statements that are not paid
    waiting        INTEGER NOT NULL DEFAULT 0,  -- served, and not accepted yet
    PRIMARY KEY (peer, currency)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER ledger_entries_are_not_changed BEFORE UPDATE ON ledger_entries
WHEN OLD.signature IS NOT NEW.signature
  OR OLD.peer IS NOT NEW.peer
  OR OLD.served_by_us IS NOT NEW.served_by_us
  OR OLD.request_id IS NOT NEW.request_id
  OR OLD.leg IS NOT NEW.leg
  OR OLD.choice IS NOT NEW.choice
  OR OLD.prompt IS NOT NEW.prompt
  OR OLD.prompt_paid IS NOT NEW.prompt_paid
  OR OLD.amount IS NOT NEW.amount
  OR OLD.currency IS NOT NEW.currency
  OR OLD.at IS NOT NEW.at
  OR OLD.proof IS NOT NEW.proof
  OR OLD.proof_sha256 IS NOT NEW.proof_sha256
  OR (OLD.acceptance <> x'' AND OLD.acceptance <> NEW.acceptance)
  OR (OLD.statement IS NOT NULL AND OLD.statement IS NOT NEW.statement)
  OR (NEW.statement IS NOT NULL AND NEW.acceptance = x'')
  OR (NEW.disputed IS NOT OLD.disputed AND NEW.acceptance <> x'')
  OR (NEW.forgiven_at IS NOT OLD.forgiven_at
      AND (OLD.forgiven_at IS NOT NULL OR NEW.acceptance <> x'' OR NOT NEW.served_by_us))
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_entries_are_not_deleted BEFORE DELETE ON ledger_entries
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_entries_are_not_replaced BEFORE INSERT ON ledger_entries
WHEN EXISTS (
    SELECT 1 FROM ledger_entries WHERE peer = NEW.peer AND served_by_us = NEW.served_by_us
        AND request_id = NEW.request_id AND leg = NEW.leg AND choice = NEW.choice
)
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_statements_are_not_changed BEFORE UPDATE ON ledger_statements WHEN 1
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_statements_are_not_deleted BEFORE DELETE ON ledger_statements
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_statements_are_not_replaced BEFORE INSERT ON ledger_statements
WHEN EXISTS (
    SELECT 1 FROM ledger_statements
    WHERE id = NEW.id OR (peer = NEW.peer AND sequence = NEW.sequence)
)
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_paid_are_not_changed BEFORE UPDATE ON ledger_paid WHEN 1
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_paid_are_not_deleted BEFORE DELETE ON ledger_paid
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_paid_are_not_replaced BEFORE INSERT ON ledger_paid
WHEN EXISTS (SELECT 1 FROM ledger_paid WHERE statement = NEW.statement)
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;

CREATE TRIGGER ledger_entries_are_counted AFTER INSERT ON ledger_entries BEGIN
    INSERT INTO ledger_balances (peer, currency) VALUES (NEW.peer, NEW.currency)
    ON CONFLICT DO NOTHING;
    UPDATE ledger_balances SET waiting = waiting + NEW.amount
    WHERE NEW.served_by_us AND NEW.acceptance = x''
          AND peer = NEW.peer AND currency = NEW.currency;
    UPDATE ledger_balances SET
        served = served + iif(NEW.served_by_us, NEW.amount, 0),
        received = received + iif(NEW.served_by_us, 0, NEW.amount),
        open_served = open_served + iif(NEW.served_by_us, NEW.amount, 0),
        open_received = open_received + iif(NEW.served_by_us, 0, NEW.amount)
    WHERE NEW.acceptance <> x'' AND peer = NEW.peer AND currency = NEW.currency;
END;
CREATE TRIGGER ledger_entries_are_accepted AFTER UPDATE OF acceptance ON ledger_entries
WHEN OLD.acceptance = x'' AND NEW.acceptance <> x'' BEGIN
    UPDATE ledger_balances SET waiting = waiting - NEW.amount
    WHERE NEW.served_by_us AND OLD.forgiven_at IS NULL
          AND peer = NEW.peer AND currency = NEW.currency;
    UPDATE ledger_balances SET
        served = served + iif(NEW.served_by_us, NEW.amount, 0),
        received = received + iif(NEW.served_by_us, 0, NEW.amount),
        open_served = open_served + iif(NEW.served_by_us, NEW.amount, 0),
        open_received = open_received + iif(NEW.served_by_us, 0, NEW.amount)
    WHERE peer = NEW.peer AND currency = NEW.currency;
END;
CREATE TRIGGER ledger_entries_are_forgiven AFTER UPDATE OF forgiven_at ON ledger_entries
WHEN OLD.forgiven_at IS NULL AND NEW.forgiven_at IS NOT NULL BEGIN
    UPDATE ledger_balances SET waiting = waiting - NEW.amount
    WHERE peer = NEW.peer AND currency = NEW.currency;
END;
CREATE TRIGGER ledger_entries_are_settled AFTER UPDATE OF statement ON ledger_entries
WHEN OLD.statement IS NULL AND NEW.statement IS NOT NULL BEGIN
    UPDATE ledger_balances SET
        open_served = open_served - iif(NEW.served_by_us, NEW.amount, 0),
        open_received = open_received - iif(NEW.served_by_us, 0, NEW.amount),
        carried = carried + CASE WHEN NEW.served_by_us THEN NEW.amount ELSE -NEW.amount END
    WHERE peer = NEW.peer AND currency = NEW.currency;
END;
CREATE TRIGGER ledger_statements_are_paid AFTER INSERT ON ledger_paid BEGIN
    UPDATE ledger_balances SET carried = carried - (
        SELECT coalesce(
            sum(CASE WHEN entry.served_by_us THEN entry.amount ELSE -entry.amount END), 0
        ) FROM ledger_entries AS entry
        WHERE entry.statement = NEW.statement AND entry.currency = ledger_balances.currency
    )
    WHERE peer = (SELECT peer FROM ledger_statements WHERE id = NEW.statement);
END;

-- The log of receipts, and its checkpoints.

-- Its histories, of which the last goes on.  Entries between two belong to none: no checkpoint
-- covers them, and their receipts have got others.
CREATE TABLE logs (
    id           INTEGER PRIMARY KEY,
    origin       TEXT NOT NULL UNIQUE,
    first_entry  INTEGER NOT NULL,  -- the id of the entry with the index 0
    size         INTEGER,           -- once it has ended
    restart      BLOB,              -- what the box has signed about the log before, if it had one
    signature    BLOB
) STRICT;

CREATE TABLE log_entries (
    id    INTEGER PRIMARY KEY AUTOINCREMENT,
    hash  BLOB NOT NULL  -- SHA-256 of the signed bytes of a receipt, which may be deleted
) STRICT;
CREATE TRIGGER log_entries_are_not_changed BEFORE UPDATE ON log_entries WHEN 1
BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER log_entries_are_not_deleted BEFORE DELETE ON log_entries
BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER log_entries_are_not_replaced BEFORE INSERT ON log_entries
WHEN EXISTS (SELECT 1 FROM log_entries WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;

-- Hashes of 256 entries each, and of 256 such hashes; those of single entries follow from these.
CREATE TABLE log_tiles (
    log     INTEGER NOT NULL REFERENCES logs (id),
    level   INTEGER NOT NULL,  -- from 1 on
    number  INTEGER NOT NULL,
    hashes  BLOB NOT NULL,     -- up to 256, side by side
    PRIMARY KEY (log, level, number)
) STRICT;

CREATE TABLE log_checkpoints (
    log       INTEGER NOT NULL REFERENCES logs (id),
    size      INTEGER NOT NULL,
    at        INTEGER NOT NULL,
    note      TEXT NOT NULL,               -- signed, with the cosignatures that have come
    cosigned  INTEGER NOT NULL DEFAULT 0,  -- by so many witnesses
    PRIMARY KEY (log, size)
) STRICT, WITHOUT ROWID;
CREATE INDEX log_checkpoints_cosigned ON log_checkpoints (log, size) WHERE cosigned > 0;

-- Which receipts the box has deleted itself.
CREATE TABLE log_removals (
    id         INTEGER PRIMARY KEY,
    log        INTEGER NOT NULL REFERENCES logs (id),
    signed     BLOB NOT NULL,  -- the exact bytes under the signature
    signature  BLOB NOT NULL
) STRICT;
CREATE INDEX log_removals_by_log ON log_removals (log, id);

-- What is to be done before the log goes on: adopt (receipts that have no entry get one), restored
-- (this is a copy: another log begins).
CREATE TABLE log_pending (task TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;

-- Checkpoints of others, cosignatures, evidence.

-- Of each log that this box witnesses, the last checkpoint that it cosigned.
CREATE TABLE witnessed (
    origin      TEXT PRIMARY KEY,
    node_id     TEXT NOT NULL,     -- whose log it is; '' if it is no box's
    size        INTEGER NOT NULL,
    root        BLOB NOT NULL,
    note        TEXT NOT NULL,     -- with the log's signature and this box's cosignature
    cosigned_at INTEGER NOT NULL,
    restart     BLOB NOT NULL      -- the signed statement with which it followed another; or empty
) STRICT, WITHOUT ROWID;
CREATE INDEX witnessed_by_box ON witnessed (node_id);

-- What is wrong with the logs of others: forks, proofs that were not given, entries that were lost.
CREATE TABLE log_alarms (
    id          TEXT PRIMARY KEY,
    kind        TEXT NOT NULL,
    node_id     TEXT NOT NULL,
    origin      TEXT NOT NULL,
    found_at    INTEGER NOT NULL,
    detail      TEXT NOT NULL,     -- a sentence
    document    BLOB NOT NULL,     -- what proves it to others; or empty
    dismissed   INTEGER NOT NULL   -- 1: the operator has decided that it no longer counts
) STRICT, WITHOUT ROWID;
CREATE INDEX log_alarms_by_origin ON log_alarms (origin, kind);

-- Transcripts and audits.

-- What an audit of a request needs; goes with the request's receipt.
CREATE TABLE transcripts (
    request_id  TEXT PRIMARY KEY,
    sealed_to   BLOB,          -- X25519: the public half of the key's secret; NULL: not sealed
    body        BLOB NOT NULL
) STRICT;
CREATE TRIGGER transcripts_go_with_receipts AFTER DELETE ON receipts BEGIN
    DELETE FROM transcripts WHERE request_id = OLD.request_id;
END;

-- What audits of peers have found.
CREATE TABLE peer_audits (
    node_id    TEXT PRIMARY KEY,
    watched    INTEGER NOT NULL,  -- requests that it served, at first or since an audit failed
    agreed     INTEGER NOT NULL,  -- legs
    failed     INTEGER NOT NULL,
    disproved  INTEGER NOT NULL,  -- of the failed: those that are proof
    undecided  INTEGER NOT NULL DEFAULT 0  -- chosen, and nothing could be said of them
) STRICT, WITHOUT ROWID;

-- Legs whose proofs an audit has shown to be false, with what shows it: not owed in our eyes.
-- Nothing is changed or deleted.
CREATE TABLE ledger_disproofs (
    peer        TEXT NOT NULL,
    request_id  TEXT NOT NULL,
    leg         INTEGER NOT NULL,
    choice      INTEGER NOT NULL,
    at          INTEGER NOT NULL,
    amount      INTEGER NOT NULL CHECK (amount >= 0),
    currency    TEXT NOT NULL,
    signed      BLOB NOT NULL,  -- the evidence, as this box signed it
    signature   BLOB NOT NULL,
    PRIMARY KEY (peer, request_id, leg, choice)
) STRICT;
CREATE TRIGGER ledger_disproofs_are_not_changed BEFORE UPDATE ON ledger_disproofs WHEN 1
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_disproofs_are_not_deleted BEFORE DELETE ON ledger_disproofs
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_disproofs_are_not_replaced BEFORE INSERT ON ledger_disproofs
WHEN EXISTS (
    SELECT 1 FROM ledger_disproofs WHERE peer = NEW.peer AND request_id = NEW.request_id
        AND leg = NEW.leg AND choice = NEW.choice
)
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;

PRAGMA user_version = 8;

"""The tables of the ledger: what boxes owe each other (see `migrations`)."""

from __future__ import annotations


def _append_only(table: str, same: str, change: str = "1") -> tuple[str, ...]:
    """Nothing is deleted or replaced, and nothing is updated when `change` holds."""
    no = "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
    return (
        f"CREATE TRIGGER {table}_are_not_changed BEFORE UPDATE ON {table} WHEN {change} {no}",
        f"CREATE TRIGGER {table}_are_not_deleted BEFORE DELETE ON {table} {no}",
        f"CREATE TRIGGER {table}_are_not_replaced BEFORE INSERT ON {table}"
        f" WHEN EXISTS (SELECT 1 FROM {table} WHERE {same}) {no}",
    )


_ENTRY = ("peer", "served_by_us", "request_id", "leg", "choice")
_FIXED = (
    "signature",
    *_ENTRY,
    "prompt",
    "prompt_paid",
    "amount",
    "currency",
    "at",
    "proof",
    "proof_sha256",
)
_SIGNED = "CASE WHEN {row}.served_by_us THEN {row}.amount ELSE -{row}.amount END"
_ACCEPTED = """
    UPDATE ledger_balances SET
        served = served + iif(NEW.served_by_us, NEW.amount, 0),
        received = received + iif(NEW.served_by_us, 0, NEW.amount),
        open_served = open_served + iif(NEW.served_by_us, NEW.amount, 0),
        open_received = open_received + iif(NEW.served_by_us, 0, NEW.amount)
    WHERE peer = NEW.peer AND currency = NEW.currency;
"""
LEDGER = (
    # One leg of one choice, served to a peer or by it.  Two things come later, each once: the
    # coordinator's signature, without which it counts for nobody, and the statement it is in.  What
    # never gets the first may be written off, once.
    """
    CREATE TABLE ledger_entries (
        peer          TEXT NOT NULL,
        served_by_us  INTEGER NOT NULL,
        request_id    TEXT NOT NULL,
        leg           INTEGER NOT NULL,
        choice        INTEGER NOT NULL,
        prompt        INTEGER NOT NULL,
        prompt_paid   INTEGER NOT NULL,  -- whether the amount has the prompt's price in it
        amount        INTEGER NOT NULL CHECK (amount >= 0),
        currency      TEXT NOT NULL,
        at            INTEGER NOT NULL,
        proof         BLOB NOT NULL,     -- the exact bytes under both signatures
        proof_sha256  BLOB NOT NULL,     -- of them: boxes compare entries by the thousands
        signature     BLOB NOT NULL,     -- of who served
        acceptance    BLOB NOT NULL,     -- of who had asked; empty until it came
        statement     TEXT REFERENCES ledger_statements (id) DEFERRABLE INITIALLY DEFERRED,
        disputed      TEXT,              -- why the peer does not accept what we served it
        forgiven_at   INTEGER,           -- when we wrote that off
        PRIMARY KEY (peer, served_by_us, request_id, leg, choice)
    ) STRICT
    """,
    # Choices share their prompt and pay for it once.
    "CREATE UNIQUE INDEX ledger_prompts ON ledger_entries (peer, served_by_us, request_id, prompt)"
    " WHERE prompt_paid AND acceptance <> x''",
    "CREATE INDEX ledger_open ON ledger_entries (peer, request_id) WHERE statement IS NULL",
    "CREATE INDEX ledger_waiting ON ledger_entries (peer) WHERE acceptance = x''",
    "CREATE INDEX ledger_by_statement ON ledger_entries (statement) WHERE statement IS NOT NULL",
    """
    CREATE TABLE ledger_statements (
        id        TEXT PRIMARY KEY,
        peer      TEXT NOT NULL,
        sequence  INTEGER NOT NULL,  -- 1, 2, ... with that peer
        at        INTEGER NOT NULL,
        signed    BLOB NOT NULL,     -- the exact bytes under both signatures
        ours      BLOB NOT NULL,
        theirs    BLOB NOT NULL,
        UNIQUE (peer, sequence)
    ) STRICT
    """,
    # That what a statement left over was made good outside, as this side's operator says.
    """
    CREATE TABLE ledger_paid (
        statement  TEXT PRIMARY KEY REFERENCES ledger_statements (id),
        at         INTEGER NOT NULL
    ) STRICT
    """,
    # Sums of the entries, kept by the triggers below.
    """
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
    ) STRICT, WITHOUT ROWID
    """,
    *_append_only(
        "ledger_entries",
        " AND ".join(f"{name} = NEW.{name}" for name in _ENTRY),
        " OR ".join(f"OLD.{name} IS NOT NEW.{name}" for name in _FIXED)
        + " OR (OLD.acceptance <> x'' AND OLD.acceptance <> NEW.acceptance)"
        " OR (OLD.statement IS NOT NULL AND OLD.statement IS NOT NEW.statement)"
        " OR (NEW.statement IS NOT NULL AND NEW.acceptance = x'')"
        " OR (NEW.disputed IS NOT OLD.disputed AND NEW.acceptance <> x'')"
        " OR (NEW.forgiven_at IS NOT OLD.forgiven_at"
        "     AND (OLD.forgiven_at IS NOT NULL OR NEW.acceptance <> x'' OR NOT NEW.served_by_us))",
    ),
    *_append_only(
        "ledger_statements", "id = NEW.id OR (peer = NEW.peer AND sequence = NEW.sequence)"
    ),
    *_append_only("ledger_paid", "statement = NEW.statement"),
    f"""
    CREATE TRIGGER ledger_entries_are_counted AFTER INSERT ON ledger_entries BEGIN
        INSERT INTO ledger_balances (peer, currency) VALUES (NEW.peer, NEW.currency)
        ON CONFLICT DO NOTHING;
        UPDATE ledger_balances SET waiting = waiting + NEW.amount
        WHERE NEW.served_by_us AND NEW.acceptance = x''
              AND peer = NEW.peer AND currency = NEW.currency;
        {_ACCEPTED.replace("WHERE", "WHERE NEW.acceptance <> x'' AND")}
    END
    """,
    f"""
    CREATE TRIGGER ledger_entries_are_accepted AFTER UPDATE OF acceptance ON ledger_entries
    WHEN OLD.acceptance = x'' AND NEW.acceptance <> x'' BEGIN
        UPDATE ledger_balances SET waiting = waiting - NEW.amount
        WHERE NEW.served_by_us AND OLD.forgiven_at IS NULL
              AND peer = NEW.peer AND currency = NEW.currency;
        {_ACCEPTED}
    END
    """,
    """
    CREATE TRIGGER ledger_entries_are_forgiven AFTER UPDATE OF forgiven_at ON ledger_entries
    WHEN OLD.forgiven_at IS NULL AND NEW.forgiven_at IS NOT NULL BEGIN
        UPDATE ledger_balances SET waiting = waiting - NEW.amount
        WHERE peer = NEW.peer AND currency = NEW.currency;
    END
    """,
    f"""
    CREATE TRIGGER ledger_entries_are_settled AFTER UPDATE OF statement ON ledger_entries
    WHEN OLD.statement IS NULL AND NEW.statement IS NOT NULL BEGIN
        UPDATE ledger_balances SET
            open_served = open_served - iif(NEW.served_by_us, NEW.amount, 0),
            open_received = open_received - iif(NEW.served_by_us, 0, NEW.amount),
            carried = carried + {_SIGNED.format(row="NEW")}
        WHERE peer = NEW.peer AND currency = NEW.currency;
    END
    """,
    f"""
    CREATE TRIGGER ledger_statements_are_paid AFTER INSERT ON ledger_paid BEGIN
        UPDATE ledger_balances SET carried = carried - (
            SELECT coalesce(sum({_SIGNED.format(row="entry")}), 0) FROM ledger_entries AS entry
            WHERE entry.statement = NEW.statement AND entry.currency = ledger_balances.currency
        )
        WHERE peer = (SELECT peer FROM ledger_statements WHERE id = NEW.statement);
    END
    """,
)

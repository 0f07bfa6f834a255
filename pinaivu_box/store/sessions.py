"""Sessions of browsers that have logged in: the cookie's token is stored as SHA-256."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection

import msgspec
from ulid import ULID

from pinaivu_box.errors import RowNotFound
from pinaivu_box.store.audit import Actor, record
from pinaivu_box.store.database import Database, Row, SqlStatement
from pinaivu_box.store.times import now_ms

_DAY = 86_400_000
IDLE = 14 * _DAY  # milliseconds without a request after which a session has ended
LIFE = 30 * _DAY  # and after which it has ended in any case
_CLOCK_TOLERANCE = 300_000  # a clock that is set back by so little ends no session
_MAX_PER_ACCOUNT = 100
_MAX_USER_AGENT_CHARACTERS = 300
_TOKEN_BYTES = 32


class Session(msgspec.Struct, frozen=True):
    """Times in Unix milliseconds; `csrf` has to come with each request that changes something."""

    id: str
    account_id: str
    csrf: str
    created_at: int
    last_seen: int
    address: str
    user_agent: str


_COLUMNS = ", ".join(f"sessions.{name}" for name in Session.__struct_fields__)
_VALID = (
    "sessions.created_at BETWEEN ?1 - " + str(LIFE) + f" AND ?1 + {_CLOCK_TOLERANCE}"
    f" AND sessions.last_seen BETWEEN ?1 - {IDLE} AND ?1 + {_CLOCK_TOLERANCE}"
)
FIND = (
    f"SELECT {_COLUMNS} FROM sessions JOIN accounts ON accounts.id = account_id"
    f" WHERE token_hash = ?2 AND removed_at IS NULL AND {_VALID}"
)


def hash_of(token: str) -> bytes:
    # Plain SHA-256 suffices: a token has 256 random bits, which cannot be guessed.
    return hashlib.sha256(token.encode()).digest()


def new_token() -> str:
    return secrets.token_urlsafe(_TOKEN_BYTES)


def _printable(text: str) -> str:
    return "".join(one for one in text[:_MAX_USER_AGENT_CHARACTERS] if one.isprintable())


async def create(
    database: Database,
    account_id: str,
    *,
    address: str,
    user_agent: str,
    password: str | None = None,
) -> tuple[Session, str]:
    """A new session, and the token for its cookie, which is stored nowhere.

    With the hash of a `password`, only if the account still has that one.  Raises RowNotFound if
    it has not, or is removed.
    """
    token, now = new_token(), now_ms()
    session = Session(
        id=f"sess_{ULID()}".lower(),
        account_id=account_id,
        csrf=secrets.token_urlsafe(24),
        created_at=now,
        last_seen=now,
        address=address,
        user_agent=_printable(user_agent),
    )
    (created, *_) = await database.write(
        (
            "INSERT INTO sessions (id, account_id, token_hash, csrf, created_at, last_seen,"
            " address, user_agent) SELECT ?, id, ?, ?, ?, ?, ?, ? FROM accounts"
            " WHERE id = ? AND removed_at IS NULL AND (?9 IS NULL OR password = ?9)",
            (
                *(session.id, hash_of(token), session.csrf, now, now),
                *(session.address, session.user_agent, account_id, password),
            ),
        ),
        record(Actor(account_id, address), "session.create", session.id, account=account_id),
        (
            "DELETE FROM sessions WHERE account_id = ?1 AND id NOT IN (SELECT id FROM sessions"
            " WHERE account_id = ?1 ORDER BY created_at DESC, id DESC LIMIT ?2)",
            (account_id, _MAX_PER_ACCOUNT),
        ),
    )
    if not created:
        raise RowNotFound("The account was removed, or has another password now: log in again.")
    return session, token


async def find(database: Database, token: str) -> Session | None:
    """The session whose cookie has that token; None if there is none, or it has ended."""
    rows = await database.read(FIND, (now_ms(), hash_of(token)))
    return _session(rows[0]) if rows else None


async def ls(database: Database, account_id: str) -> list[Session]:
    """Those of an account, the newest first."""
    rows = await database.read(
        f"SELECT {_COLUMNS} FROM sessions WHERE account_id = ?2 AND {_VALID}"
        " ORDER BY created_at DESC, id DESC",
        (now_ms(), account_id),
    )
    return [_session(row) for row in rows]


async def has_begun(database: Database, account_name: str, address: str) -> bool:
    """Whether a session of the account was begun at that address and has not ended."""
    rows = await database.read(
        "SELECT 1 FROM sessions JOIN accounts ON accounts.id = account_id"
        " WHERE name = ? AND removed_at IS NULL AND address = ? LIMIT 1",
        (account_name, address),
    )
    return bool(rows)


async def valid_of(database: Database, ids: Collection[str]) -> set[str]:
    """Those of these ids whose sessions have not ended."""
    rows = await database.scan(
        f"SELECT id FROM sessions WHERE id IN (SELECT value FROM json_each(?2)) AND {_VALID}",
        (now_ms(), msgspec.json.encode(list(ids)).decode()),
    )
    return {row["id"] for row in rows}


async def exists(database: Database, session_id: str) -> bool:
    """Whether a session has not ended."""
    sql = f"SELECT 1 FROM sessions WHERE id = ?2 AND {_VALID}"
    return bool(await database.read(sql, (now_ms(), session_id)))


async def seen(database: Database, session_id: str) -> None:
    """Note that the session is used now."""
    await database.write(("UPDATE sessions SET last_seen = ? WHERE id = ?", (now_ms(), session_id)))


async def end(database: Database, session_id: str, account_id: str, by: Actor) -> None:
    """End a session of that account.  Raises RowNotFound."""
    (ended, _) = await database.write(
        ("DELETE FROM sessions WHERE id = ? AND account_id = ?", (session_id, account_id)),
        record(by, "session.end", session_id, account=account_id),
    )
    if not ended:
        raise RowNotFound("There is no such session: it may have ended already.")


async def end_others(database: Database, account_id: str, beside: str, by: Actor) -> int:
    """End all sessions of an account beside one; returns how many."""
    (ended, _) = await database.write(
        end_of_account(account_id, beside=beside),
        record(by, "session.end", account_id, all_others=True),
    )
    return ended


def delete_ended(now: int) -> tuple[SqlStatement, SqlStatement]:
    """The statements that delete the sessions and one-time links that have ended by `now`."""
    return (
        (f"DELETE FROM sessions WHERE NOT ({_VALID})", (now,)),
        ("DELETE FROM login_links WHERE expires_at <= ?", (now,)),
    )


def end_one(session_id: str) -> SqlStatement:
    """The statement that ends a session."""
    return "DELETE FROM sessions WHERE id = ?", (session_id,)


def end_of_account(account_id: str, *, beside: str = "") -> SqlStatement:
    """The statement that ends all sessions of an account, `beside` the one with that id."""
    return "DELETE FROM sessions WHERE account_id = ? AND id <> ?", (account_id, beside)


def _session(row: Row) -> Session:
    return Session(**{name: row[name] for name in Session.__struct_fields__})

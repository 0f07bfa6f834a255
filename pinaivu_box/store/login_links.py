"""One-time links: they set the password of an account, or invite somebody to sign up.

The token that a link holds is stored as SHA-256, and each link works once.
"""

from __future__ import annotations

import sqlite3

import msgspec
from ulid import ULID

from pinaivu_box.errors import RowConflict, RowNotFound
from pinaivu_box.store import accounts, pages_keys, sessions
from pinaivu_box.store.accounts import Account, Role
from pinaivu_box.store.audit import Actor, record
from pinaivu_box.store.database import Database
from pinaivu_box.store.times import now_ms, time_text

PASSWORD_LIFE = 15 * 60_000  # milliseconds
INVITATION_LIFE = 7 * 86_400_000
_MAX_INVITATIONS = 1000
_USED = "This link was used already, or is too old: ask for another one."


class OneTimeLink(msgspec.Struct, frozen=True):
    """Without an `account_id` it is an invitation.  `expires_at` in Unix milliseconds."""

    id: str
    account_id: str | None
    expires_at: int


async def create(database: Database, account: Account, by: Actor) -> tuple[OneTimeLink, str]:
    """A link that sets the password of an account, and its token; a former link no longer works.
    The account has its pages key from then on, so that it can be limited before it is used."""
    await pages_keys.of(database, account, by)
    return await _create(database, account.id, PASSWORD_LIFE, by)


async def invite(database: Database, by: Actor) -> tuple[OneTimeLink, str]:
    """A link for somebody to sign up, and its token.  Raises RowConflict for too many."""
    (row,) = await database.read(
        "SELECT count(*) AS n FROM login_links WHERE account_id IS NULL AND expires_at > ?",
        (now_ms(),),
    )
    if row["n"] >= _MAX_INVITATIONS:
        raise RowConflict(f"{_MAX_INVITATIONS} invitations are open already: wait until some end.")
    return await _create(database, None, INVITATION_LIFE, by)


async def _create(
    database: Database, account_id: str | None, life: int, by: Actor
) -> tuple[OneTimeLink, str]:
    token, now = sessions.new_token(), now_ms()
    link = OneTimeLink(f"link_{ULID()}".lower(), account_id, now + life)
    action = "account.invite" if account_id is None else "account.password_link"
    await database.write(
        # What is too old is left to retention, which knows how far the clock may be trusted.
        ("DELETE FROM login_links WHERE account_id = ?", (account_id,)),
        (
            "INSERT INTO login_links (id, token_hash, account_id, created_by, created_at,"
            " expires_at) VALUES (?, ?, ?, ?, ?, ?)",
            (link.id, sessions.hash_of(token), account_id, by.name, now, link.expires_at),
        ),
        record(by, action, account_id or link.id, expires_at=time_text(link.expires_at)),
    )
    return link, token


async def find(database: Database, token: str) -> OneTimeLink:
    """The link with that token, which stays unused.  Raises RowNotFound if it does not work."""
    rows = await database.read(
        "SELECT login_links.id, account_id, expires_at FROM login_links"
        " LEFT JOIN accounts ON accounts.id = account_id"
        " WHERE token_hash = ?1 AND expires_at > ?2 AND login_links.created_at <= ?2 + ?3"
        " AND removed_at IS NULL",
        (sessions.hash_of(token), now_ms(), PASSWORD_LIFE),
    )
    if not rows:
        raise RowNotFound(_USED)
    return OneTimeLink(**dict(rows[0]))


async def use(database: Database, link: OneTimeLink) -> None:
    """From now on the link does not work.  Raises RowNotFound if it does not already."""
    (used,) = await database.write(
        ("DELETE FROM login_links WHERE id = ? AND expires_at > ?", (link.id, now_ms()))
    )
    if not used:
        raise RowNotFound(_USED)


async def accept(
    database: Database, link: OneTimeLink, name: str, password: str, by: Actor
) -> Account:
    """Use an invitation: a new member's account.  Raises InvalidValue, RowConflict if the name is
    taken, RowNotFound if the invitation does not work any more."""
    await accounts.check_new_name(database, name)
    hashed = await accounts.hash_password(password, link.id)
    role: Role = "member"
    account, _, recorded = accounts.new(name, role, hashed, by)
    try:
        (_, created, _) = await database.write(
            (
                "DELETE FROM login_links WHERE id = ? AND account_id IS NULL AND expires_at > ?",
                (link.id, now_ms()),
            ),
            (
                "INSERT INTO accounts (id, name, role, password, created_at)"
                " SELECT ?, ?, ?, ?, ? WHERE changes() > 0",
                (account.id, name, role, hashed, account.created_at),
            ),
            recorded,
        )
    except sqlite3.IntegrityError as error:
        raise RowConflict(f"There is an account {name} already: choose another name.") from error
    if not created:
        raise RowNotFound(_USED)
    return account

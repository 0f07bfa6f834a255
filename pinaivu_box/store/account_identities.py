"""Who at which provider of single sign-on an account belongs to.

The pair of issuer and subject is what identifies a person; a name or an email address never does,
since a provider may give those to somebody else.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from pinaivu_box.errors import Forbidden, RowConflict
from pinaivu_box.store import accounts, sessions
from pinaivu_box.store.accounts import Account, Role
from pinaivu_box.store.audit import Actor, record
from pinaivu_box.store.database import Database
from pinaivu_box.store.times import now_ms

_MAX_NAMES = 20  # that are tried for a new account


async def find(database: Database, issuer: str, subject: str) -> Account | None:
    """The account of that person, None if there is none yet.  Raises Forbidden if it was
    removed."""
    rows = await database.read(
        "SELECT accounts.id, removed_at FROM account_identities"
        " JOIN accounts ON accounts.id = account_id WHERE issuer = ? AND subject = ?",
        (issuer, subject),
    )
    if not rows:
        return None
    if rows[0]["removed_at"] is not None:
        raise Forbidden(
            "Your account was removed from this box: its operator can link you to another one."
        )
    return await accounts.find(database, rows[0]["id"])


async def create_account(
    database: Database, issuer: str, subject: str, names: Iterator[str], role: Role, by: Actor
) -> Account:
    """A new account of that person, with the first of the names that is free.

    Raises RowConflict if the person has got one at the same time.
    """
    for _, name in zip(range(_MAX_NAMES), names, strict=False):
        accounts.check_name(name)
        account, *statements = accounts.new(name, role, None, by)
        try:
            await database.write(
                *statements,
                (
                    "INSERT INTO account_identities (issuer, subject, account_id, linked_at)"
                    " VALUES (?, ?, ?, ?)",
                    (issuer, subject, account.id, now_ms()),
                ),
                record(by, "account.link", account.id, issuer=issuer, name=subject),
            )
        except sqlite3.IntegrityError:
            if await find(database, issuer, subject) is not None:
                break
            continue  # the name is taken
        return account
    raise RowConflict("The account has just been made: log in again.")


async def link(database: Database, issuer: str, subject: str, account: Account, by: Actor) -> None:
    """Let that person log in to this account from now on, and to no other: sessions of the account
    that was theirs end."""
    await database.write(
        (
            "DELETE FROM sessions WHERE account_id IN (SELECT account_id FROM account_identities"
            " WHERE issuer = ? AND subject = ? AND account_id <> ?)",
            (issuer, subject, account.id),
        ),
        (
            "INSERT INTO account_identities (issuer, subject, account_id, linked_at)"
            " VALUES (?, ?, ?, ?) ON CONFLICT (issuer, subject)"
            " DO UPDATE SET account_id = excluded.account_id, linked_at = excluded.linked_at",
            (issuer, subject, account.id, now_ms()),
        ),
        record(by, "account.link", account.id, issuer=issuer, name=subject),
    )


async def unlink(database: Database, account: Account, by: Actor) -> int:
    """Let nobody log in to this account by single sign-on, and end its sessions; how many could
    before."""
    (removed, *_) = await database.write(
        ("DELETE FROM account_identities WHERE account_id = ?", (account.id,)),
        record(by, "account.unlink", account.id),
        sessions.end_of_account(account.id),
    )
    return removed

"""Accounts: they own keys, and a person may log in to one with a password."""

from __future__ import annotations

import asyncio
import re
import secrets
import sqlite3
from typing import Literal

import msgspec
from nacl.exceptions import InvalidkeyError
from nacl.pwhash import argon2id
from ulid import ULID

from pinaivu_box.errors import InvalidValue, RowConflict, RowNotFound
from pinaivu_box.store.audit import Actor, record
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.times import now_ms

OWNER = "acct_owner"  # in every home from the beginning
Role = Literal["admin", "member"]
_NAME = re.compile(r"(?!acct_)[a-z0-9][a-z0-9._@-]{0,63}")  # no name can be another's id
_MIN_PASSWORD_CHARACTERS = 8
# Hashing a password takes a fifth of a second and 64 MiB.
_HASH_LIMITS = {
    "opslimit": argon2id.OPSLIMIT_INTERACTIVE,
    "memlimit": argon2id.MEMLIMIT_INTERACTIVE,
}
# A hash of no known password, which takes as long to check as any.
_UNKNOWN_PASSWORD = f"$argon2id$v=19$m=65536,t=2,p=1${'A' * 22}${'A' * 43}"


class Account(msgspec.Struct, frozen=True):
    """`created_at` in Unix milliseconds; `keys` counts those that are not revoked."""

    id: str
    name: str
    role: Role
    has_password: bool
    created_at: int
    keys: int


_SELECT = """
    SELECT id, name, role, password IS NOT NULL AS has_password, created_at,
           (SELECT count(*) FROM keys WHERE account_id = accounts.id AND revoked_at IS NULL) AS keys
    FROM accounts WHERE removed_at IS NULL
"""


async def ls(database: Database, *, after: str = "", limit: int = 100) -> list[Account]:
    """The first `limit` accounts by name, from the one after the name `after`."""
    rows = await database.scan(f"{_SELECT} AND name > ? ORDER BY name LIMIT ?", (after, limit))
    return [msgspec.convert(dict(row), Account, strict=False) for row in rows]


async def find(database: Database, name_or_id: str) -> Account:
    """Raises RowNotFound."""
    rows = await database.read(f"{_SELECT} AND (name = ? OR id = ?)", (name_or_id, name_or_id))
    if not rows:
        raise RowNotFound(f"No account is called {name_or_id}: 'pinaivu accounts ls' lists them.")
    return msgspec.convert(dict(rows[0]), Account, strict=False)


async def create(
    database: Database, name: str, role: Role, password: str | None, by: Actor
) -> Account:
    """Without a password nobody can log in to it.  Raises InvalidValue, RowConflict."""
    check_name(name)
    hashed = None if password is None else await _hash(password)
    account, *statements = new(name, role, hashed, by)
    try:
        await database.write(*statements)
    except sqlite3.IntegrityError as error:
        raise RowConflict(f"There is an account {name} already: choose another name.") from error
    return account


def check_name(name: str) -> None:
    """Raises InvalidValue."""
    if not _NAME.fullmatch(name):
        raise InvalidValue(
            f"'{name}' is not a valid account name: use 1 to 64 of a-z, 0-9, and . _ @ - after the "
            "first, and not acct_ at the beginning",
            field="name",
        )


def new(
    name: str, role: Role, hashed: str | None, by: Actor
) -> tuple[Account, SqlStatement, SqlStatement]:
    """A new account, and the statements that store it, which fail with sqlite3.IntegrityError if
    its name is taken."""
    account = Account(f"acct_{ULID()}".lower(), name, role, hashed is not None, now_ms(), 0)
    return (
        account,
        (
            "INSERT INTO accounts (id, name, role, password, created_at) VALUES (?, ?, ?, ?, ?)",
            (account.id, name, role, hashed, account.created_at),
        ),
        record(by, "account.create", account.id, name=name, role=role),
    )


def names_for_key(key_name: str) -> tuple[str, str]:
    """The name of the account of a key that was given none, and another if that is taken."""
    slug = re.sub(r"[^a-z0-9._@-]+", "-", key_name.lower()).strip("-._@")[:48] or "key"
    slug = re.sub(r"^acct_", "acct-", slug)
    return slug, f"{slug}-{secrets.token_hex(4)}"


async def set_password(
    database: Database, account: Account, password: str | None, by: Actor
) -> None:
    """Set the password; without one nobody can log in.  Raises InvalidValue if it is too short."""
    hashed = None if password is None else await _hash(password)
    await database.write(
        ("UPDATE accounts SET password = ? WHERE id = ?", (hashed, account.id)),
        record(by, "account.passwd", account.id, set=hashed is not None),
    )


async def set_role(database: Database, account: Account, role: Role, by: Actor) -> None:
    """Raises RowConflict for the owner, and if a member would have keys with the scope 'admin'."""
    if role == account.role:
        return
    if account.id == OWNER:
        raise RowConflict(
            "The account 'owner' stays an admin's: the box would have none without it."
        )
    (changed, _) = await database.write(
        (
            "UPDATE accounts SET role = ?1 WHERE id = ?2 AND (?1 = 'admin' OR NOT EXISTS ("
            " SELECT 1 FROM keys, json_each(policy, '$.scopes') AS scope"
            " WHERE account_id = ?2 AND revoked_at IS NULL AND scope.value = 'admin'))",
            (role, account.id),
        ),
        record(by, "account.role", account.id, before=account.role, after=role),
    )
    if not changed:
        raise RowConflict(
            f"{account.name} has keys with the scope 'admin', which a member's cannot have: revoke "
            "them, or change their scopes."
        )


async def check_password(database: Database, name: str, password: str) -> Account | None:
    """The account with that name and password, or None; a wrong name takes as long as a wrong
    password."""
    rows = await database.read(
        "SELECT id, password FROM accounts WHERE name = ? AND removed_at IS NULL", (name,)
    )
    hashed = (rows[0]["password"] if rows else None) or _UNKNOWN_PASSWORD
    try:
        await asyncio.to_thread(argon2id.verify, hashed.encode(), password.encode())
    except InvalidkeyError:
        return None
    return await find(database, rows[0]["id"]) if rows else None


async def remove(database: Database, account: Account, by: Actor) -> None:
    """Revoke its keys too; its usage is kept.  Raises RowConflict for the owner."""
    if account.id == OWNER:
        raise RowConflict("The account 'owner' stays: the box would have no admin without it.")
    now = now_ms()
    await database.write(
        (
            "UPDATE accounts SET removed_at = ? WHERE id = ? AND removed_at IS NULL",
            (now, account.id),
        ),
        record(by, "account.rm", account.id, name=account.name, keys=account.keys),
        (
            "UPDATE keys SET revoked_at = ? WHERE account_id = ? AND revoked_at IS NULL",
            (now, account.id),
        ),
    )


async def _hash(password: str) -> str:
    if len(password) < _MIN_PASSWORD_CHARACTERS:
        raise InvalidValue(
            f"a password has at least {_MIN_PASSWORD_CHARACTERS} characters", field="password"
        )
    hashed = await asyncio.to_thread(argon2id.str, password.encode(), **_HASH_LIMITS)
    return hashed.decode()

"""Accounts: they own keys, and a person may log in to one with a password."""

from __future__ import annotations

import asyncio
import re
import secrets
import sqlite3
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, TypeVar

import msgspec
from nacl.exceptions import InvalidkeyError
from nacl.pwhash import argon2id
from ulid import ULID

from pinaivu_box.errors import InvalidValue, RateLimited, RowConflict, RowNotFound
from pinaivu_box.store import account_secrets, sessions
from pinaivu_box.store.audit import Actor, record
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.times import now_ms

OWNER = "acct_owner"  # in every home from the beginning
Role = Literal["admin", "member"]
T = TypeVar("T")
_NAME = re.compile(r"(?!acct_)[a-z0-9][a-z0-9._@-]{0,63}")  # no name can be another's id
_MIN_PASSWORD_CHARACTERS = 8
# Hashing a password takes a fifth of a second and 64 MiB: no more than two run at the same time.
_HASHERS = ThreadPoolExecutor(2, thread_name_prefix="passwords")
_WAITING: Counter[str] = Counter()  # what runs or waits for these threads, by account
_MAX_WAITING = 6  # of an account
_TAKEN = "There is an account {} already: choose another name."
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


_ANY = """
    SELECT id, name, role, password IS NOT NULL AS has_password, created_at,
           (SELECT count(*) FROM keys WHERE account_id = accounts.id AND revoked_at IS NULL) AS keys
    FROM accounts
"""
_SCOPES_BUT_ADMIN = (  # of a key
    "SELECT json_group_array(value) FROM json_each(policy, '$.scopes') WHERE value <> 'admin'"
)
_SELECT = f"{_ANY} WHERE removed_at IS NULL"


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


async def find_removed(database: Database, name_or_id: str) -> Account:
    """As `find`, and if there is none the last removed account of that name or id.  Raises
    RowNotFound."""
    rows = await database.read(
        f"{_ANY} WHERE name = ?1 OR id = ?1 ORDER BY removed_at IS NULL DESC, removed_at DESC",
        (name_or_id,),
    )
    if not rows:
        return await find(database, name_or_id)
    return msgspec.convert(dict(rows[0]), Account, strict=False)


async def create(
    database: Database, name: str, role: Role, password: str | None, by: Actor
) -> Account:
    """Without a password nobody can log in to it.  Raises InvalidValue, RowConflict."""
    await check_new_name(database, name)
    hashed = None if password is None else await hash_password(password)
    account, *statements = new(name, role, hashed, by)
    try:
        await database.write(*statements)
    except sqlite3.IntegrityError as error:
        raise RowConflict(_TAKEN.format(name)) from error
    return account


async def check_new_name(database: Database, name: str) -> None:
    """Raises InvalidValue, RowConflict for a name that another account has: to be seen before a
    password is hashed for nothing."""
    check_name(name)
    if await database.read(
        "SELECT 1 FROM accounts WHERE name = ? AND removed_at IS NULL LIMIT 1", (name,)
    ):
        raise RowConflict(_TAKEN.format(name))


def check_name(name: str) -> None:
    """Raises InvalidValue."""
    if not _NAME.fullmatch(name):
        raise InvalidValue(
            f"'{name}' is not a valid account name: use 1 to 64 of a-z, 0-9, and . _ @ - after the "
            "first, and not acct_ at the beginning",
            field="name",
        )


def is_name(text: str) -> bool:
    """Whether an account can be called so."""
    return _NAME.fullmatch(text) is not None


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
    """Set the password, and end all sessions; without one nobody can log in.  The account's chats
    stay sealed by the old one (see `chats.data_keys`).

    Raises InvalidValue if it is too short.
    """
    hashed = None if password is None else await hash_password(password, account.id)
    await database.write(
        ("UPDATE accounts SET password = ? WHERE id = ?", (hashed, account.id)),
        record(by, "account.passwd", account.id, set=hashed is not None),
        account_secrets.password_was_reset(account.id),
        *_closed(account.id),
    )


async def change_password(
    database: Database,
    account: Account,
    password: str,
    by: Actor,
    *rewrapped: SqlStatement,
    checked: str,
) -> str:
    """Set another password for whoever knows the old one, whose hash is `checked`, and end all
    sessions; `rewrapped` are the statements that wrap the key of the account's chats by the new
    one.

    Returns the password's hash.  Raises InvalidValue if it is too short, RowConflict if the account
    has another password than the checked one meanwhile.
    """
    hashed = await hash_password(password, account.id)
    try:
        await database.write(
            (
                "UPDATE accounts SET password = ? WHERE id = ? AND password = ?",
                (hashed, account.id, checked),
            ),
            record(by, "account.passwd", account.id, set=True),
            # Fails, and the transaction with it, if the first has changed nothing.
            (
                "UPDATE accounts SET name = NULL WHERE id = ? AND password IS NOT ?",
                (account.id, hashed),
            ),
            *rewrapped,
            *_closed(account.id),
        )
    except sqlite3.IntegrityError as error:
        raise RowConflict(
            "The password was changed meanwhile: log in again, with the new one."
        ) from error
    return hashed


async def have_passwords(database: Database) -> bool:
    """Whether there is an account that somebody can log in to with a password."""
    sql = "SELECT 1 FROM accounts WHERE password IS NOT NULL AND removed_at IS NULL LIMIT 1"
    return bool(await database.read(sql))


async def admin_can_log_in(database: Database) -> bool:
    """Whether an admin's account has a password, or belongs to somebody at a provider of single
    sign-on."""
    rows = await database.read(
        "SELECT 1 FROM accounts WHERE role = 'admin' AND removed_at IS NULL AND"
        " (password IS NOT NULL OR id IN (SELECT account_id FROM account_identities)) LIMIT 1"
    )
    return bool(rows)


def _closed(account_id: str) -> tuple[SqlStatement, ...]:
    """The statements that end all sessions of an account, and void its one-time links."""
    return (
        sessions.end_of_account(account_id),
        ("DELETE FROM login_links WHERE account_id = ?", (account_id,)),
    )


async def set_role(database: Database, account: Account, role: Role, by: Actor) -> None:
    """Also give or take the pages key the scope 'admin'.

    Raises RowConflict for the owner, and if a member would have other keys with that scope.
    """
    if role == account.role:
        return
    if account.id == OWNER:
        raise RowConflict(
            "The account 'owner' stays an admin's: the box would have none without it."
        )
    (changed, *_) = await database.write(
        (
            "UPDATE accounts SET role = ?1 WHERE id = ?2 AND (?1 = 'admin' OR NOT EXISTS ("
            " SELECT 1 FROM keys, json_each(policy, '$.scopes') AS scope"
            " WHERE account_id = ?2 AND revoked_at IS NULL AND scope.value = 'admin'"
            " AND keys.id IS NOT accounts.pages_key))",
            (role, account.id),
        ),
        record(by, "account.role", account.id, before=account.role, after=role),
        *_pages_key_of_role(account.id),
    )
    if not changed:
        raise RowConflict(
            f"{account.name} has keys with the scope 'admin', which a member's cannot have: revoke "
            "them, or change their scopes."
        )


async def demote(database: Database, account: Account, by: Actor) -> None:
    """Make an admin's account a member's: none of its keys has the scope 'admin' any more, and its
    sessions end."""
    if account.role != "admin":
        return
    await database.write(
        ("UPDATE accounts SET role = 'member' WHERE id = ? AND role = 'admin'", (account.id,)),
        record(by, "account.role", account.id, before="admin", after="member", keys="demoted"),
        (
            f"UPDATE keys SET policy = json_set(policy, '$.scopes', ({_SCOPES_BUT_ADMIN}))"
            " WHERE account_id = ? AND policy ->> '$.scopes' LIKE '%\"admin\"%'",
            (account.id,),
        ),
        sessions.end_of_account(account.id),
    )


def _pages_key_of_role(account_id: str) -> tuple[SqlStatement, SqlStatement]:
    """The statements that make the pages key's scope 'admin' follow the role of its account."""
    of_role = (
        "UPDATE keys SET policy = json_set(policy, '$.scopes', ({scopes}))"
        " WHERE id = (SELECT pages_key FROM accounts WHERE id = ?1 AND role {role} 'admin')"
    )
    with_admin = f"SELECT json_insert(({_SCOPES_BUT_ADMIN}), '$[#]', 'admin')"
    return (
        (of_role.format(scopes=_SCOPES_BUT_ADMIN, role="<>"), (account_id,)),
        (of_role.format(scopes=with_admin, role="="), (account_id,)),
    )


async def check_password(database: Database, name: str, password: str) -> Account | None:
    """The account with that name and password, or None; a wrong name takes as long as a wrong
    password."""
    verified = await verify_password(database, name, password)
    return None if verified is None else verified[0]


async def verify_password(
    database: Database, name: str, password: str
) -> tuple[Account, str] | None:
    """As `check_password`, with the stored hash, by which `sessions.create` makes sure that the
    password has not changed meanwhile."""
    rows = await database.read(
        "SELECT id, password FROM accounts WHERE name = ? AND removed_at IS NULL", (name,)
    )
    hashed: str = (rows[0]["password"] if rows else None) or _UNKNOWN_PASSWORD
    try:
        await in_hasher(partial(argon2id.verify, hashed.encode(), _bytes(password)))
    except InvalidkeyError:
        return None
    return (await find(database, rows[0]["id"]), hashed) if rows else None


async def remove(database: Database, account: Account, by: Actor) -> None:
    """Revoke its keys and end its sessions too; its usage is kept.  Raises RowConflict for the
    owner."""
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
        *_closed(account.id),
    )


async def hash_password(password: str, whose: str = "") -> str:
    """Raises InvalidValue if it is too short, RateLimited as `in_hasher` does."""
    if len(password) < _MIN_PASSWORD_CHARACTERS:
        raise InvalidValue(
            f"a password has at least {_MIN_PASSWORD_CHARACTERS} characters", field="password"
        )
    hashed: bytes = await in_hasher(partial(argon2id.str, _bytes(password), **_HASH_LIMITS), whose)
    return hashed.decode()


async def in_hasher(work: Callable[[], T], whose: str = "") -> T:
    """Run Argon2, of which no more than two run at the same time.

    `whose`: the id of the account that asks, or of its invitation, so that nobody keeps the others
    waiting.  Raises RateLimited if too much is waiting for it already.
    """
    if whose and _WAITING[whose] >= _MAX_WAITING:
        raise RateLimited(
            "Too many passwords of this account are being checked: try again in a few seconds."
        )
    _WAITING[whose] += 1
    try:
        return await asyncio.get_running_loop().run_in_executor(_HASHERS, work)
    finally:
        _WAITING[whose] -= 1
        if not _WAITING[whose]:
            del _WAITING[whose]


def _bytes(password: str) -> bytes:
    return password.encode(errors="surrogatepass")  # JSON can spell halves of surrogate pairs

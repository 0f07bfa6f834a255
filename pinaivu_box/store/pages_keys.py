"""The pages key of an account: what its sessions may do, and what that is counted on.

It is a key as any other, edited by admins as any other, but it has no secret: its row holds the
hash of one that nobody knows.  It begins with the limits of a member's first key: whoever was given
a limited key has no more on pages.
"""

from __future__ import annotations

import secrets

import msgspec
from ulid import ULID

from pinaivu_box.errors import RowConflict
from pinaivu_box.policy import LOCAL_ONLY, MEMBER_SCOPES, Policy, Scope
from pinaivu_box.store import keys
from pinaivu_box.store.accounts import Account
from pinaivu_box.store.audit import Actor, record
from pinaivu_box.store.database import Database
from pinaivu_box.store.keys import Key
from pinaivu_box.store.times import now_ms

NAME = "pages"
_SCOPES: tuple[Scope, ...] = (*MEMBER_SCOPES, "account")


async def of(database: Database, account: Account, by: Actor) -> Key:
    """The pages key of an account, which is created if there is none.

    Raises RowConflict if the account is changed or removed at the same time.
    """
    if (key := await find(database, account.id)) is not None:
        return key
    key_id, (policy, expires_at) = f"key_{ULID()}".lower(), await _first_limits(database, account)
    await database.write(
        (
            "INSERT INTO keys (id, account_id, hash, prefix, last_four, name, policy, created_at,"
            " expires_at) SELECT ?, id, ?, '', '', ?, ?, ?, ? FROM accounts"
            " WHERE id = ? AND role = ? AND removed_at IS NULL AND pages_key IS NULL",
            (
                *(key_id, secrets.token_bytes(32), NAME, msgspec.json.encode(policy).decode()),
                *(now_ms(), expires_at, account.id, account.role),
            ),
        ),
        record(by, "key.create", key_id, name=NAME, account=account.name, policy=policy),
        (
            "UPDATE accounts SET pages_key = ?1 WHERE id = ?2 AND pages_key IS NULL"
            " AND EXISTS (SELECT 1 FROM keys WHERE id = ?1)",
            (key_id, account.id),
        ),
    )
    if (key := await find(database, account.id)) is None:
        raise RowConflict(f"The account {account.name} has just been changed: try again.")
    return key


async def _first_limits(database: Database, account: Account) -> tuple[Policy, int | None]:
    """The policy and the expiry of the account's pages key when it is made."""
    if account.role == "admin":  # who could lift them
        return Policy(scopes=(*_SCOPES, "admin")), None
    rows = await database.read(
        "SELECT id FROM keys WHERE account_id = ? AND revoked_at IS NULL ORDER BY id LIMIT 1",
        (account.id,),
    )
    if not rows:
        return Policy(scopes=_SCOPES), None
    first = await keys.get(database, rows[0]["id"])
    scopes = (*_SCOPES, LOCAL_ONLY) if LOCAL_ONLY in first.policy.scopes else _SCOPES
    return msgspec.structs.replace(first.policy, scopes=scopes), first.expires_at


async def find(database: Database, account_id: str) -> Key | None:
    """The pages key of an account; None before its first session."""
    rows = await database.read("SELECT pages_key FROM accounts WHERE id = ?", (account_id,))
    key_id = rows[0]["pages_key"] if rows else None
    return None if key_id is None else await keys.get(database, key_id)

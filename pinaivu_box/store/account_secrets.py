"""What wraps the data keys of accounts (see `chats.sealing`)."""

from __future__ import annotations

import msgspec

from pinaivu_box.store.database import Database, SqlStatement

PASSWORD, PASSPHRASE, NONE, RECOVERY = "password", "passphrase", "none", "recovery"
FORMER = "former"  # the password before one that was set without it


class AccountSecret(msgspec.Struct, frozen=True):
    """`kind`: one of those above; with `none` the data key itself is `wrapped`."""

    account_id: str
    kind: str
    salt: bytes
    ops_limit: int
    mem_limit: int
    wrapped: bytes
    created_at: int


_COLUMNS = ", ".join(AccountSecret.__struct_fields__)


async def of(database: Database, account_id: str) -> dict[str, AccountSecret]:
    """By kind."""
    rows = await database.read(
        f"SELECT {_COLUMNS} FROM account_secrets WHERE account_id = ?", (account_id,)
    )
    return {row["kind"]: AccountSecret(*row) for row in rows}


def put(secret: AccountSecret) -> SqlStatement:
    """The statement that stores it, or replaces the one of its kind."""
    places = ", ".join("?" for _ in AccountSecret.__struct_fields__)
    return (
        f"INSERT OR REPLACE INTO account_secrets ({_COLUMNS}) VALUES ({places})",
        msgspec.structs.astuple(secret),
    )


def put_first(secret: AccountSecret) -> SqlStatement:
    """The statement that stores it unless the account has any: of two sessions that begin at once,
    one makes the key."""
    places = ", ".join(f"?{number + 1}" for number in range(len(AccountSecret.__struct_fields__)))
    return (
        f"INSERT INTO account_secrets ({_COLUMNS}) SELECT {places}"
        " WHERE NOT EXISTS (SELECT 1 FROM account_secrets WHERE account_id = ?1)",
        msgspec.structs.astuple(secret),
    )


def without_kinds(account_id: str, *kinds: str) -> SqlStatement:
    """The statement that deletes those of these kinds."""
    places = ", ".join("?" for _ in kinds)
    return (
        f"DELETE FROM account_secrets WHERE account_id = ? AND kind IN ({places})",
        (account_id, *kinds),
    )


def delete_all(account_id: str) -> SqlStatement:
    return "DELETE FROM account_secrets WHERE account_id = ?", (account_id,)


def password_was_reset(account_id: str) -> SqlStatement:
    """The statement for whoever sets another password without knowing the old one: only that, or
    the recovery key, opens the chats from now on."""
    return (
        "UPDATE OR REPLACE account_secrets SET kind = ? WHERE account_id = ? AND kind = ?",
        (FORMER, account_id, PASSWORD),
    )

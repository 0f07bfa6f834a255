"""Rows of what the box remembers of the users; what they say is sealed (see `chats.sealing`)."""

from __future__ import annotations

import msgspec

from pinaivu_box.store.database import Database, SqlStatement


class MemoryRow(msgspec.Struct, frozen=True):
    """`vector`: that of an embedding model, sealed too; empty if there is none yet."""

    id: str
    created_at: int
    updated_at: int
    sealed: bytes
    vector: bytes = b""


_COLUMNS = ", ".join(MemoryRow.__struct_fields__)


async def ls(database: Database, account_id: str) -> list[MemoryRow]:
    """All of an account, newest first."""
    rows = await database.read(
        f"SELECT {_COLUMNS} FROM memories WHERE account_id = ? ORDER BY created_at DESC, id DESC",
        (account_id,),
    )
    return [MemoryRow(*row) for row in rows]


def insert(row: MemoryRow, account_id: str, max_count: int) -> SqlStatement:
    """The statement that stores it, if the account is not removed and has fewer than
    `max_count`."""
    return (
        f"INSERT INTO memories (account_id, {_COLUMNS}) SELECT ?1, ?2, ?3, ?4, ?5, ?6"
        " WHERE (SELECT count(*) FROM memories WHERE account_id = ?1) < ?7"
        " AND EXISTS (SELECT 1 FROM accounts WHERE id = ?1 AND removed_at IS NULL)",
        (account_id, *msgspec.structs.astuple(row), max_count),
    )


def update(row: MemoryRow, account_id: str) -> SqlStatement:
    return (
        "UPDATE memories SET updated_at = ?, sealed = ?, vector = ?"
        " WHERE id = ? AND account_id = ?",
        (row.updated_at, row.sealed, row.vector, row.id, account_id),
    )


def put_vector(memory_id: str, account_id: str, updated_at: int, vector: bytes) -> SqlStatement:
    """The statement that stores the vector, unless the memory has changed since."""
    return (
        "UPDATE memories SET vector = ? WHERE id = ? AND account_id = ? AND updated_at = ?",
        (vector, memory_id, account_id, updated_at),
    )


def delete(memory_id: str, account_id: str) -> SqlStatement:
    return "DELETE FROM memories WHERE id = ? AND account_id = ?", (memory_id, account_id)


def delete_all(account_id: str) -> SqlStatement:
    return "DELETE FROM memories WHERE account_id = ?", (account_id,)


async def settings_of(database: Database, account_id: str) -> bytes:
    """The account's sealed settings of its chats; empty if there are none."""
    rows = await database.read(
        "SELECT sealed FROM chat_settings WHERE account_id = ?", (account_id,)
    )
    return bytes(rows[0]["sealed"]) if rows else b""


def put_settings(account_id: str, sealed: bytes, before: bytes) -> SqlStatement:
    """The statement that stores them, if the account is not removed and has those of `before`."""
    return (
        "INSERT OR REPLACE INTO chat_settings (account_id, sealed)"
        " SELECT id, ?1 FROM accounts WHERE id = ?2 AND removed_at IS NULL AND ?3 ="
        " coalesce((SELECT sealed FROM chat_settings WHERE account_id = ?2), x'')",
        (sealed, account_id, before),
    )

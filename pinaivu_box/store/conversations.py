"""Rows of conversations and their messages; what they say is sealed (see `chats.sealing`)."""

from __future__ import annotations

import msgspec

from pinaivu_box.store.database import Database, SqlStatement


class ConversationRow(msgspec.Struct, frozen=True):
    id: str
    created_at: int
    updated_at: int
    sealed: bytes


class MessageRow(msgspec.Struct, frozen=True):
    id: str
    conversation_id: str
    parent_id: str | None
    created_at: int
    sealed: bytes


class ChatSizes(msgspec.Struct, frozen=True):
    """What an account has: conversations, and the bytes of their messages."""

    conversations: int
    bytes: int


# A `+` keeps SQLite from an index: a conversation has few messages, an account many.
_CONVERSATION = "id, created_at, updated_at, sealed"
_MESSAGE = "id, conversation_id, parent_id, created_at, sealed"


async def page(
    database: Database, account_id: str, before: tuple[int, str] | None, limit: int
) -> list[ConversationRow]:
    """The newest of an account, or those `before` the one with that time and id."""
    updated_at, last = before or (2**62, "")
    rows = await database.read(
        f"SELECT {_CONVERSATION} FROM conversations WHERE account_id = ?"
        " AND (updated_at, id) < (?, ?) ORDER BY updated_at DESC, id DESC LIMIT ?",
        (account_id, updated_at, last, limit),
    )
    return [ConversationRow(*row) for row in rows]


async def find(database: Database, account_id: str, conversation_id: str) -> ConversationRow | None:
    rows = await database.read(
        f"SELECT {_CONVERSATION} FROM conversations WHERE id = ? AND account_id = ?",
        (conversation_id, account_id),
    )
    return ConversationRow(*rows[0]) if rows else None


async def messages(database: Database, account_id: str, conversation_id: str) -> list[MessageRow]:
    """All of a conversation, oldest first."""
    rows = await database.scan(
        f"SELECT {_MESSAGE} FROM messages WHERE conversation_id = ? AND +account_id = ?"
        " ORDER BY created_at, id",
        (conversation_id, account_id),
    )
    return [MessageRow(*row) for row in rows]


async def messages_of(
    database: Database, account_id: str, conversation_ids: list[str]
) -> list[MessageRow]:
    """All of some conversations."""
    places = ", ".join("?" for _ in conversation_ids)
    rows = await database.scan(
        f"SELECT {_MESSAGE} FROM messages WHERE conversation_id IN ({places}) AND +account_id = ?",
        (*conversation_ids, account_id),
    )
    return [MessageRow(*row) for row in rows]


_BRANCH = """
    WITH RECURSIVE branch (id, parent_id, bytes) AS (
        SELECT id, parent_id, bytes FROM messages
        WHERE id = ?1 AND conversation_id = ?2 AND account_id = ?3
        UNION
        SELECT m.id, m.parent_id, m.bytes FROM branch JOIN messages AS m ON m.id = branch.parent_id
        WHERE m.conversation_id = ?2 AND m.account_id = ?3
    )
"""


async def branch_size(database: Database, account_id: str, conversation_id: str, leaf: str) -> int:
    """The bytes of a message and those before it."""
    rows = await database.read(
        f"{_BRANCH} SELECT coalesce(sum(bytes), 0) FROM branch", (leaf, conversation_id, account_id)
    )
    return int(rows[0][0])


async def branch(
    database: Database, account_id: str, conversation_id: str, leaf: str
) -> list[MessageRow]:
    """A message and those before it; empty if there is no such one."""
    rows = await database.scan(
        f"{_BRANCH} SELECT m.id, m.conversation_id, m.parent_id, m.created_at, m.sealed"
        " FROM branch JOIN messages AS m USING (id) ORDER BY m.created_at, m.id",
        (leaf, conversation_id, account_id),
    )
    return [MessageRow(*row) for row in rows]


async def message(
    database: Database, account_id: str, conversation_id: str, message_id: str
) -> MessageRow | None:
    rows = await database.read(
        f"SELECT {_MESSAGE} FROM messages WHERE id = ? AND conversation_id = ? AND account_id = ?",
        (message_id, conversation_id, account_id),
    )
    return MessageRow(*rows[0]) if rows else None


async def sizes(database: Database, account_id: str) -> ChatSizes:
    rows = await database.read(
        "SELECT conversations, bytes FROM chat_sums WHERE account_id = ?", (account_id,)
    )
    return ChatSizes(*rows[0]) if rows else ChatSizes(0, 0)


async def sizes_of(database: Database, conversation_ids: list[str]) -> dict[str, tuple[int, int]]:
    """How many messages each of these conversations has, and how many bytes."""
    places = ", ".join("?" for _ in conversation_ids)
    rows = await database.scan(
        "SELECT conversation_id, count(*), sum(bytes) FROM messages"
        f" WHERE conversation_id IN ({places}) GROUP BY conversation_id",
        conversation_ids,
    )
    return dict.fromkeys(conversation_ids, (0, 0)) | {row[0]: (row[1], row[2]) for row in rows}


def insert(row: ConversationRow, account_id: str, room: ChatSizes) -> SqlStatement:
    """The statement that stores it, if the account is not removed and has no more than `room`."""
    return (
        "INSERT INTO conversations (id, account_id, created_at, updated_at, sealed)"
        " SELECT ?, accounts.id, ?, ?, ? FROM accounts"
        " LEFT JOIN chat_sums ON chat_sums.account_id = accounts.id"
        " WHERE accounts.id = ? AND removed_at IS NULL"
        " AND coalesce(conversations, 0) <= ? AND coalesce(bytes, 0) <= ?",
        (
            *(row.id, row.created_at, row.updated_at, row.sealed, account_id),
            *(room.conversations, room.bytes),
        ),
    )


def update(row: ConversationRow, account_id: str, before: bytes) -> SqlStatement:
    """The statement that stores it, unless it was deleted, or what is sealed is no longer `before`:
    each sealing has a nonce of its own, so it tells one version from another."""
    return (
        "UPDATE conversations SET updated_at = ?, sealed = ?"
        " WHERE id = ? AND account_id = ? AND sealed = ?",
        (row.updated_at, row.sealed, row.id, account_id, before),
    )


def delete(conversation_id: str, account_id: str) -> tuple[SqlStatement, SqlStatement]:
    """The statements that delete it with its messages."""
    ids = (conversation_id, account_id)
    return (
        ("DELETE FROM messages WHERE conversation_id = ? AND +account_id = ?", ids),
        ("DELETE FROM conversations WHERE id = ? AND account_id = ?", ids),
    )


def insert_message(
    row: MessageRow, account_id: str, conversation: bytes | None = None
) -> SqlStatement:
    """The statement that stores it, unless its conversation was deleted meanwhile, or has become
    another than the one that is sealed so."""
    return (
        "INSERT INTO messages"
        " (id, conversation_id, account_id, parent_id, created_at, sealed, bytes)"
        " SELECT ?1, id, account_id, ?2, ?3, ?4, ?5 FROM conversations"
        " WHERE id = ?6 AND account_id = ?7 AND (?8 IS NULL OR sealed = ?8)",
        (
            *(row.id, row.parent_id, row.created_at, row.sealed, len(row.sealed)),
            *(row.conversation_id, account_id, conversation),
        ),
    )


def update_message(message_id: str, account_id: str, sealed: bytes) -> SqlStatement:
    return (
        "UPDATE messages SET sealed = ?, bytes = ? WHERE id = ? AND account_id = ?",
        (sealed, len(sealed), message_id, account_id),
    )


def delete_all(account_id: str) -> tuple[SqlStatement, SqlStatement]:
    return (
        ("DELETE FROM messages WHERE account_id = ?", (account_id,)),
        ("DELETE FROM conversations WHERE account_id = ?", (account_id,)),
    )

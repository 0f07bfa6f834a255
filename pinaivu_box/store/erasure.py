"""Erases what an account has stored.  Sums, receipts and the audit trail stay, without its name;
transcripts do not."""

from __future__ import annotations

import msgspec

from pinaivu_box.store import account_secrets, conversations, memories, sessions, transcripts
from pinaivu_box.store.accounts import OWNER, Account
from pinaivu_box.store.audit import ERASED, Actor, forget_names, note
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.times import now_ms


class Erasure(msgspec.Struct, frozen=True):
    """How much was deleted."""

    conversations: int
    memories: int
    responses: int
    transcripts: int = 0


async def erase(database: Database, account: Account, by: Actor) -> Erasure:
    """Delete chats, memories, stored responses, transcripts and sessions, and remove the account,
    whose name and whose keys' names are replaced.  The owner's account stays, since the box needs
    an admin: it loses its content and its password."""
    statements = _content(account.id)
    counts = await database.write(
        *statements,
        ("DELETE FROM responses WHERE account_id = ?", (account.id,)),
        transcripts.delete_all(account.id),
        sessions.end_of_account(account.id),
        ("DELETE FROM login_links WHERE account_id = ?", (account.id,)),
        ("DELETE FROM account_identities WHERE account_id = ?", (account.id,)),
        ("UPDATE accounts SET password = NULL WHERE id = ?", (account.id,)),
        *(() if account.id == OWNER else _nameless(account)),
        note(by, "account.erase", account.id),
    )
    if any(counts[: len(statements) + 2]):
        await database.scrub()
    _, deleted_conversations, deleted_memories = counts[:3]
    return Erasure(
        deleted_conversations,
        deleted_memories,
        *counts[len(statements) : len(statements) + 2],
    )


async def erase_chats(database: Database, account_id: str, session_id: str, by: Actor) -> None:
    """Delete chats and memories, with what wraps their key, and end all sessions beside that one,
    which may have the key still."""
    counts = await database.write(
        *_content(account_id),
        sessions.end_of_account(account_id, beside=session_id),
        note(by, "account.start_anew", account_id),
    )
    if any(counts[:-2]):
        database.scrub_later()


def _content(account_id: str) -> tuple[SqlStatement, ...]:
    return (
        *conversations.delete_all(account_id),
        memories.delete_all(account_id),
        ("DELETE FROM chat_settings WHERE account_id = ?", (account_id,)),
        account_secrets.delete_all(account_id),
    )


def _nameless(account: Account) -> tuple[SqlStatement, ...]:
    now = now_ms()
    return (
        *forget_names(account.id, account.name),
        (
            "UPDATE keys SET name = ?, revoked_at = coalesce(revoked_at, ?) WHERE account_id = ?",
            (ERASED, now, account.id),
        ),
        (
            "UPDATE accounts SET name = ?, removed_at = coalesce(removed_at, ?) WHERE id = ?",
            (f"{ERASED}-{account.id[-6:]}", now, account.id),
        ),
    )

"""Transcripts of requests, plain or sealed.  They are deleted with their receipts, by a trigger."""

from __future__ import annotations

from msgspec import Struct

from pinaivu_box.store.database import Database, SqlStatement


class StoredTranscript(Struct, frozen=True):
    """`body` is the JSON of a `receipts.transcript`; sealed to `sealed_to` (see
    `receipts.transcript_sealing`) unless that is None."""

    body: bytes
    sealed_to: bytes | None = None


# An account may be erased while its request runs, or waits for an audit.
_OF_NO_ERASED = (
    "NOT EXISTS (SELECT 1 FROM receipts JOIN accounts ON accounts.id = receipts.account_id"
    " WHERE request_id = ?1 AND removed_at IS NOT NULL)"
)


def storing(request_id: str, transcript: StoredTranscript) -> SqlStatement:
    """The statement that stores it unless its account was removed, for the transaction of its
    receipt."""
    return (
        "INSERT INTO transcripts (request_id, sealed_to, body) SELECT ?1, ?2, ?3"
        f" WHERE {_OF_NO_ERASED}",
        (request_id, transcript.sealed_to, transcript.body),
    )


async def find(
    database: Database, request_id: str, *, account_id: str | None
) -> StoredTranscript | None:
    """The transcript of a request, if it is of that account; of any account if that is None."""
    rows = await database.read(
        "SELECT body, sealed_to FROM transcripts JOIN receipts USING (request_id)"
        " JOIN keys ON keys.id = receipts.key_id"
        " WHERE request_id = ?1 AND (?2 IS NULL OR keys.account_id = ?2)",
        (request_id, account_id),
    )
    return StoredTranscript(*rows[0]) if rows else None


def delete_all(account_id: str) -> SqlStatement:
    """The statement that deletes those of an account."""
    return (
        "DELETE FROM transcripts WHERE request_id IN (SELECT request_id FROM receipts WHERE"
        " account_id = ?)",
        (account_id,),
    )


def storing_if_missing(request_id: str, transcript: StoredTranscript) -> SqlStatement:
    """The statement that stores it if the request has a receipt and no transcript, unless its
    account was removed."""
    return (
        "INSERT INTO transcripts (request_id, sealed_to, body) SELECT ?1, ?2, ?3 WHERE EXISTS"
        " (SELECT 1 FROM receipts WHERE request_id = ?1) AND NOT EXISTS"
        f" (SELECT 1 FROM transcripts WHERE request_id = ?1) AND {_OF_NO_ERASED}",
        (request_id, transcript.sealed_to, transcript.body),
    )

"""The rows of `membership`: the network and its roster, tickets and their uses, known peers.

Times are Unix milliseconds unless said otherwise.  `audit` are statements that record a change in
the audit trail, for its transaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.times import now_ms

StoredRecord = tuple[bytes, str, bytes, bytes]  # id, kind, body, signature
_LEAVE = [(f"DELETE FROM {table}", ()) for table in ("roster", "tickets", "network")]
_REVOCATIONS = "(SELECT count(*) FROM roster WHERE kind = 'revocation')"  # they only grow


class Invitation(NamedTuple):
    """What the inviter keeps of a ticket.  `name` is the newcomer's, None if it chooses one; with
    `admin` it may invite and revoke as an admin does.  `expires_at` in Unix seconds.  `used_by` are
    node ids.  `newest`: no box was revoked since the ticket was made."""

    secret_sha256: str
    name: str | None
    expires_at: int
    uses: int
    admin: bool
    used_by: tuple[str, ...] = ()
    newest: bool = True
    made_at: int = 0


class KnownPeer(NamedTuple):
    """`name` is the one given here, "" if it has that of its certificate."""

    name: str
    addresses: tuple[str, ...]


async def network(database: Database) -> str | None:
    """The id of the network that this box belongs to."""
    rows = await database.read("SELECT network FROM network")
    return str(rows[0]["network"]) if rows else None


async def roster(database: Database) -> list[StoredRecord]:
    """All records of the roster."""
    rows = await database.read("SELECT id, kind, body, signature FROM roster")
    return [(row["id"], row["kind"], row["body"], row["signature"]) for row in rows]


async def enter(
    database: Database, network_id: str, records: Iterable[StoredRecord], *audit: SqlStatement
) -> None:
    """Enter a network with its records, and leave the one before; the tickets for that are void."""
    await database.write(
        *_LEAVE,
        ("INSERT INTO network VALUES (1, ?, ?)", (network_id, now_ms())),
        *audit,
        *map(_inserting, records),
    )


async def leave(database: Database, *audit: SqlStatement) -> None:
    """Leave the network; its tickets are void."""
    await database.write(*_LEAVE, *audit)


async def add_records(
    database: Database, records: Iterable[StoredRecord], *audit: SqlStatement
) -> None:
    await database.write(*map(_inserting, records), *audit)


async def add_ticket(database: Database, ticket: Invitation, *audit: SqlStatement) -> None:
    await database.write(
        (
            "INSERT INTO tickets (secret_sha256, name, expires_at, uses, admin, created_at,"
            f" revocations) VALUES (?, ?, ?, ?, ?, ?, {_REVOCATIONS})",
            (*ticket[:5], now_ms()),  # the fields that the caller sets
        ),
        *audit,
    )


async def ticket(database: Database, secret_sha256: str) -> Invitation | None:
    """The ticket whose secret has that hash."""
    rows = await database.read(
        f"SELECT name, expires_at, uses, admin, revocations = {_REVOCATIONS}, created_at"
        " FROM tickets WHERE secret_sha256 = ?",
        (secret_sha256,),
    )
    if not rows:
        return None
    uses = await database.read(
        "SELECT node_id FROM ticket_uses WHERE secret_sha256 = ?", (secret_sha256,)
    )
    name, expires_at, use_count, admin, newest, made_at = rows[0]
    used_by = tuple(use["node_id"] for use in uses)
    terms = (secret_sha256, name, expires_at, use_count, bool(admin))
    return Invitation(*terms, used_by, bool(newest), made_at)


async def use_ticket(database: Database, secret_sha256: str, node_id: str) -> None:
    """Record that a box used a ticket, which the caller has checked; again changes nothing."""
    await database.write(
        ("INSERT OR IGNORE INTO ticket_uses VALUES (?, ?, ?)", (secret_sha256, node_id, now_ms()))
    )


async def known(database: Database) -> dict[str, KnownPeer]:
    """All peers that this box has met or has settings for, by node id."""
    rows = await database.read("SELECT node_id, name, addresses FROM peers")
    return {node_id: KnownPeer(name, tuple(json.loads(text))) for node_id, name, text in rows}


async def first_links(database: Database) -> dict[str, int]:
    """When this box had its first link with each peer that it has met, by node id."""
    rows = await database.read("SELECT node_id, first_seen FROM peers WHERE first_seen IS NOT NULL")
    return dict(map(tuple, rows))


async def record_seen(
    database: Database, addresses_of: Mapping[str, Sequence[str]], *, linked: set[str]
) -> None:
    """Store the addresses of peers; those that are `linked` are seen now."""
    now = now_ms()
    await database.write(
        *(
            (
                "INSERT INTO peers (node_id, addresses, first_seen, last_seen)"
                " VALUES (?1, ?2, ?3, ?3)"
                " ON CONFLICT DO UPDATE SET addresses = excluded.addresses,"
                " first_seen = coalesce(first_seen, excluded.first_seen),"
                " last_seen = coalesce(excluded.last_seen, last_seen)",
                (node_id, json.dumps(addresses), now if node_id in linked else None),
            )
            for node_id, addresses in addresses_of.items()
        )
    )


def _inserting(record: StoredRecord) -> SqlStatement:
    return "INSERT OR IGNORE INTO roster VALUES (?, ?, ?, ?, ?)", (*record, now_ms())

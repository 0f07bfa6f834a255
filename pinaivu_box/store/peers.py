"""What peering keeps: the network and its roster, tickets and their uses, what is known of peers.

Rows only: what they mean is `peering`'s to know.  Times are Unix milliseconds.  `told` is what the
audit trail says of it, in the same transaction.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pinaivu_box.store.database import Database, Statement

StoredRecord = tuple[bytes, str, bytes, bytes]  # id, kind, body, signature
_REVOCATIONS = "(SELECT count(*) FROM roster WHERE kind = 'revocation')"  # they only grow


class Invitation(NamedTuple):
    """What the inviter keeps of a ticket.  `name`: what the newcomer will be called; `admin`: it
    may invite and revoke as an admin does.  `expires_at` in Unix seconds; `used_by`: node ids.
    `newest`: nobody was revoked since it was made, at `made_at` (Unix milliseconds)."""

    secret_sha256: str
    name: str | None
    expires_at: int
    uses: int
    admin: bool
    used_by: tuple[str, ...] = ()
    newest: bool = True
    made_at: int = 0


class Known(NamedTuple):
    """`name` is what this box calls it, "" if as its certificate does; `policy` has the settings
    of [peering.serve] that are others for this peer."""

    node_id: str
    name: str
    addresses: tuple[str, ...]
    first_seen: int | None
    last_seen: int | None
    policy: dict[str, Any]


def now_ms() -> int:
    return round(time.time() * 1000)


async def network(database: Database) -> str | None:
    """The id of the network that this box belongs to."""
    rows = await database.read("SELECT network FROM network")
    return str(rows[0]["network"]) if rows else None


async def roster(database: Database) -> list[StoredRecord]:
    rows = await database.read("SELECT id, kind, body, signature FROM roster")
    return [(row["id"], row["kind"], row["body"], row["signature"]) for row in rows]


async def enter(
    database: Database, network_id: str, records: Iterable[StoredRecord], *told: Statement
) -> None:
    """Belong to that network from now on, and no other; tickets for the old one are void."""
    await database.write(
        *_FORGETTING,
        _LEAVING,
        ("INSERT INTO network VALUES (1, ?, ?)", (network_id, now_ms())),
        *told,
        *map(_adding, records),
    )


async def leave(database: Database, *told: Statement) -> None:
    await database.write(*_FORGETTING, _LEAVING, *told)


async def add_records(
    database: Database, records: Iterable[StoredRecord], *told: Statement
) -> None:
    await database.write(*map(_adding, records), *told)


async def add_ticket(database: Database, ticket: Invitation, *told: Statement) -> None:
    await database.write(
        (
            "INSERT INTO tickets (secret_sha256, name, created_at, expires_at, uses, admin,"
            f" revocations) VALUES (?, ?, ?, ?, ?, ?, {_REVOCATIONS})",
            (
                ticket.secret_sha256,
                ticket.name,
                now_ms(),
                ticket.expires_at,
                ticket.uses,
                ticket.admin,
            ),
        ),
        *told,
    )


async def ticket(database: Database, secret_sha256: str) -> Invitation | None:
    rows = await database.read(
        f"SELECT *, revocations = {_REVOCATIONS} AS newest FROM tickets WHERE secret_sha256 = ?",
        (secret_sha256,),
    )
    if not rows:
        return None
    used = await database.read(
        "SELECT node_id FROM ticket_uses WHERE secret_sha256 = ?", (secret_sha256,)
    )
    (row,) = rows
    return Invitation(
        secret_sha256,
        row["name"],
        row["expires_at"],
        row["uses"],
        bool(row["admin"]),
        tuple(one["node_id"] for one in used),
        bool(row["newest"]),
        row["created_at"],
    )


async def use_ticket(database: Database, secret_sha256: str, node_id: str) -> None:
    """Whether it still may is for the caller to know; doing it again changes nothing."""
    await database.write(
        ("INSERT OR IGNORE INTO ticket_uses VALUES (?, ?, ?)", (secret_sha256, node_id, now_ms()))
    )


async def known(database: Database) -> dict[str, Known]:
    return {
        row["node_id"]: Known(
            row["node_id"],
            row["name"],
            tuple(json.loads(row["addresses"])),
            row["first_seen"],
            row["last_seen"],
            json.loads(row["policy"]),
        )
        for row in await database.read("SELECT * FROM peers")
    }


async def seen(database: Database, found: Mapping[str, Sequence[str]], *, linked: set[str]) -> None:
    """Addresses of peers; those `linked` are seen now."""
    now = now_ms()
    await database.write(
        *(
            (
                "INSERT INTO peers (node_id, addresses, first_seen, last_seen) VALUES (?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET addresses = excluded.addresses,"
                " first_seen = coalesce(first_seen, excluded.first_seen),"
                " last_seen = coalesce(excluded.last_seen, last_seen)",
                (
                    node_id,
                    json.dumps(list(addresses)),
                    *((now, now) if node_id in linked else (None, None)),
                ),
            )
            for node_id, addresses in found.items()
        )
    )


_FORGETTING: tuple[Statement, ...] = (("DELETE FROM roster", ()), ("DELETE FROM tickets", ()))
_LEAVING: Statement = ("DELETE FROM network", ())


def _adding(record: StoredRecord) -> Statement:
    return "INSERT OR IGNORE INTO roster VALUES (?, ?, ?, ?, ?)", (*record, now_ms())

"""What the operator has set for single peers: names, and limits instead of `[peering.serve]`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from pinaivu_box import amount
from pinaivu_box.peering_config import HOURS
from pinaivu_box.store.audit import Actor, record
from pinaivu_box.store.database import Database


class PeerLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """The limits of a peer; None stands for the one of `[peering.serve]`.  `tokens_per_minute` 0
    and an empty `credit_limit` (decimal text) or `hours` are no limit.  `blocked` is the reason, if
    it is blocked."""

    max_parallel: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    tokens_per_minute: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    credit_limit: str | None = None
    models: tuple[Annotated[str, Meta(min_length=1, max_length=128)], ...] | None = None
    hours: str | None = None
    blocked: Annotated[str, Meta(min_length=1, max_length=200)] | None = None


_limits = msgspec.json.Decoder(PeerLimits)


async def limits_of(database: Database, node_id: str) -> PeerLimits:
    rows = await database.read("SELECT policy FROM peers WHERE node_id = ?", (node_id,))
    return _limits.decode(rows[0]["policy"]) if rows else PeerLimits()


async def all_limits(database: Database) -> dict[str, PeerLimits]:
    """The limits of all peers that this box has met, by node id."""
    rows = await database.scan("SELECT node_id, policy FROM peers")
    return {node_id: _limits.decode(policy) for node_id, policy in rows}


async def edit(
    database: Database,
    node_id: str,
    by: Actor,
    *,
    name: str | None = None,
    limits: dict[str, Any],
) -> None:
    """A limit of None is reset to that of `[peering.serve]`.  Raises ValueError."""
    check(msgspec.convert(limits, PeerLimits))
    patch = msgspec.json.encode(limits).decode()
    await database.write(
        # Merged in the database: of two concurrent changes of different limits, none is lost.
        (
            "INSERT INTO peers (node_id, name, policy) VALUES (?1, ?2, json_patch('{}', ?3))"
            " ON CONFLICT DO UPDATE SET name = coalesce(?4, name), policy = json_patch(policy, ?3)",
            (node_id, name or "", patch, name),
        ),
        record(by, "peer.edit", node_id, **({} if name is None else {"name": name}), **limits),
    )


def check(limits: PeerLimits) -> None:
    """Check what the types do not.  Raises ValueError."""
    if limits.hours and not HOURS.fullmatch(limits.hours):
        raise ValueError(f"hours: '{limits.hours}' is not like 18:00-08:00")
    if limits.credit_limit:
        try:
            amount.parse(limits.credit_limit)
        except ValueError as error:
            raise ValueError(f"credit_limit: {error}") from None

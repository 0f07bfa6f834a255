"""What audits of peers have found (`pinaivu_box.audits`), kept from one start to the next."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from pinaivu_box.store.database import Database


class PeerAudits(Struct, frozen=True):
    """`watched` counts the requests that a peer served since it was first asked, or since an audit
    of it failed.  The others count audits of legs: that `agreed`, `failed`, and of the failed
    those that `disproved` what the peer had signed; and legs that were chosen and stayed
    `undecided`, whatever the reason."""

    watched: int = 0
    agreed: int = 0
    failed: int = 0
    disproved: int = 0
    undecided: int = 0

    @property
    def audits(self) -> int:
        return self.agreed + self.failed


_COLUMNS = ", ".join(PeerAudits.__struct_fields__)


async def load(database: Database) -> dict[str, PeerAudits]:
    """All of them, by node id."""
    rows = await database.read(f"SELECT node_id, {_COLUMNS} FROM peer_audits")
    return {row[0]: PeerAudits(*row[1:]) for row in rows}


async def keep(database: Database, audits: Mapping[str, PeerAudits]) -> None:
    await database.write(
        *(
            (
                f"INSERT OR REPLACE INTO peer_audits (node_id, {_COLUMNS})"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (node_id, *msgspec.structs.astuple(each)),
            )
            for node_id, each in audits.items()
        )
    )

"""What this box thinks of its peers (`gateway.reputation`), kept from one start to the next."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from pinaivu_box.store.database import Database


class StoredOpinion(Struct, frozen=True):
    """As it was at `at`, Unix seconds; all of it fades.  `last`: what went wrong last, in words."""

    served: float = 0.0
    failed: float = 0.0
    speed: float = 1.0
    disputes: float = 0.0
    at: float = 0.0
    last: str = ""


_COLUMNS = ", ".join(StoredOpinion.__struct_fields__)


async def load(database: Database) -> dict[str, StoredOpinion]:
    """By node id."""
    rows = await database.read(f"SELECT node_id, {_COLUMNS} FROM peer_opinions")
    return {row[0]: StoredOpinion(*row[1:]) for row in rows}


async def keep(database: Database, found: Mapping[str, StoredOpinion]) -> None:
    await database.write(
        *(
            (
                f"INSERT OR REPLACE INTO peer_opinions (node_id, {_COLUMNS})"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (node_id, *msgspec.structs.astuple(opinion)),
            )
            for node_id, opinion in found.items()
        )
    )

"""The reputations of peers (`routing.reputation`), kept from one start to the next."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from pinaivu_box.store.database import Database


class StoredOpinion(Struct, frozen=True):
    """The numbers as they were at `at`, Unix seconds, for they fade; `last` describes the last
    failure."""

    served: float = 0.0
    failed: float = 0.0
    speed: float = 1.0
    disputes: float = 0.0
    at: float = 0.0
    last: str = ""


_COLUMNS = ", ".join(StoredOpinion.__struct_fields__)


async def load(database: Database) -> dict[str, StoredOpinion]:
    """All opinions, by node id."""
    rows = await database.read(f"SELECT node_id, {_COLUMNS} FROM peer_opinions")
    return {row[0]: StoredOpinion(*row[1:]) for row in rows}


async def keep(database: Database, opinions: Mapping[str, StoredOpinion]) -> None:
    await database.write(
        *(
            (
                f"INSERT OR REPLACE INTO peer_opinions (node_id, {_COLUMNS})"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (node_id, *msgspec.structs.astuple(opinion)),
            )
            for node_id, opinion in opinions.items()
        )
    )

"""What this box thinks of peers (`routing.reputation`), and what audits of them have found
(`pinaivu_box.audits`), kept from one start to the next: tables with a row for each peer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec
from msgspec import Struct

from pinaivu_box.store.database import Database, SqlStatement


class StoredOpinion(Struct, frozen=True):
    """The numbers as they were at `at`, Unix seconds, for they fade; `last` describes the last
    failure."""

    served: float = 0.0
    failed: float = 0.0
    speed: float = 1.0
    disputes: float = 0.0
    at: float = 0.0
    last: str = ""


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


T = TypeVar("T", StoredOpinion, PeerAudits)
_TABLES: dict[type[Struct], str] = {StoredOpinion: "peer_opinions", PeerAudits: "peer_audits"}


async def load(database: Database, kind: type[T]) -> dict[str, T]:
    """All rows of the table, by node id."""
    columns = ", ".join(kind.__struct_fields__)
    rows = await database.read(f"SELECT node_id, {columns} FROM {_TABLES[kind]}")
    return {row[0]: kind(*row[1:]) for row in rows}


async def keep(database: Database, changed: Mapping[str, T]) -> None:
    """Write the rows of these peers."""
    await database.write(*(_row(node_id, row) for node_id, row in changed.items()))


def _row(node_id: str, row: Struct) -> SqlStatement:
    values = (node_id, *msgspec.structs.astuple(row))
    columns = ", ".join(("node_id", *row.__struct_fields__))
    places = ", ".join("?" * len(values))
    return f"INSERT OR REPLACE INTO {_TABLES[type(row)]} ({columns}) VALUES ({places})", values

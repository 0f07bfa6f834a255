"""Incidents, and when this box ran.  Times in Unix milliseconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec
from msgspec import Struct
from ulid import ULID

from pinaivu_box.store.database import Database

KEPT_MS = 90 * 86_400_000
Kind = Literal["engine", "peer", "errors"]


class Incident(Struct, frozen=True):
    """What went wrong with `subject`: a model whose engine died, a peer (its node id) that was
    lost, or "" where too many requests were answered with 503.

    `ended_at` is None while it goes on, and `began_at` for what takes no time.
    """

    id: str
    kind: Kind
    subject: str
    began_at: int
    ended_at: int | None
    detail: str


class Run(Struct, frozen=True):
    """The box ran from `began_at` at least until `seen_at`."""

    began_at: int
    seen_at: int


def new_id() -> str:
    return f"inc_{ULID()}".lower()


async def save(database: Database, changed: Iterable[Incident]) -> None:
    """Write these, new ones and such that were written before."""
    await database.write(
        *(
            (
                "INSERT OR REPLACE INTO incidents (id, kind, subject, began_at, ended_at, detail)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                msgspec.structs.astuple(incident),
            )
            for incident in changed
        )
    )


_SELECT = "SELECT id, kind, subject, began_at, ended_at, detail FROM incidents"
RECENT = f"{_SELECT} ORDER BY began_at DESC LIMIT ?"
_LOSSES = f"{_SELECT} WHERE kind = 'peer' AND coalesce(ended_at, ?1) >= ?1 ORDER BY began_at"


async def recent(database: Database, limit: int) -> list[Incident]:
    """The newest first."""
    return [Incident(*row) for row in await database.read(RECENT, (limit,))]


async def losses(database: Database, since: int) -> list[Incident]:
    """Of peers that were lost then or later, the oldest first."""
    return [Incident(*row) for row in await database.scan(_LOSSES, (since,))]


async def begin_run(database: Database, at: int) -> None:
    """A run begins.  Incidents that an earlier one left open ended when it was seen last, as far
    as is known."""
    await database.write(
        (
            "UPDATE incidents SET ended_at ="
            " max(began_at, coalesce((SELECT max(seen_at) FROM runs), 0)) WHERE ended_at IS NULL",
            (),
        ),
        ("INSERT INTO runs (began_at, seen_at) VALUES (?1, ?1)", (at,)),
    )


async def still_running(database: Database, at: int) -> None:
    """The run that began last goes on.  A clock that was set back takes nothing from it."""
    await database.write(
        (
            "UPDATE runs SET seen_at = max(seen_at, ?)"
            " WHERE id = (SELECT id FROM runs ORDER BY id DESC LIMIT 1)",
            (at,),
        )
    )


async def runs(database: Database) -> list[Run]:
    """The oldest first."""
    rows = await database.read("SELECT began_at, seen_at FROM runs ORDER BY id")
    return [Run(*row) for row in rows]

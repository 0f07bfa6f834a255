"""The last checkpoints that this box cosigned as a witness, and what is wrong with others' logs."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from pinaivu_box.store.database import Database, Row, SqlStatement

AlarmKind = Literal["fork", "unproven", "no-statement", "restart"]


class Witnessed(Struct, frozen=True):
    """The last checkpoint of a log that this box cosigned, at `cosigned_at` (Unix s).

    `note` has the log's signature and this box's.  `node_id` is empty if it is no box's log.
    `restart` is the signed statement with which it followed another log of that box, if it did.
    """

    origin: str
    node_id: str
    size: int
    root: bytes
    note: str
    cosigned_at: int
    restart: bytes = b""


class Alarm(Struct, frozen=True):
    """`kind`: "fork" (proven by `document`), "unproven" (the log does not prove that two of its
    checkpoints agree), "no-statement" (a new log beside a former one, and no statement), "restart"
    (a new log, stated, that lost entries).  `found_at` in Unix milliseconds; `detail` is a
    sentence.  `dismissed`: an operator has decided that it no longer counts; it is still shown, and
    passed on."""

    id: str
    kind: AlarmKind
    node_id: str
    origin: str
    found_at: int
    detail: str
    document: bytes = b""
    dismissed: bool = False


_WITNESSED = ", ".join(Witnessed.__struct_fields__)
_ALARM = ", ".join(Alarm.__struct_fields__)
# Nothing is replaced but what was judged: whatever else happens, no state is rolled back.
_KEEP = f"""INSERT INTO witnessed ({_WITNESSED}) VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (origin) DO UPDATE SET size = excluded.size, root = excluded.root,
        note = excluded.note, cosigned_at = excluded.cosigned_at, restart = excluded.restart
    WHERE witnessed.size = ? AND witnessed.root = ?"""
COUNTING = (
    "SELECT id, kind, detail FROM log_alarms WHERE origin NOT IN"
    " (SELECT origin FROM log_alarms WHERE dismissed) ORDER BY found_at, id"
)
LOUD: tuple[AlarmKind, ...] = ("fork", "no-statement")  # kinds that accuse
MAX_ALARMS_PER_LOG, MAX_ALARMS_PER_BOX = 4, 16  # of a kind: the first say it
_ADD = f"""INSERT OR IGNORE INTO log_alarms ({_ALARM}) SELECT ?, ?, ?, ?, ?, ?, ?, ?
    WHERE (SELECT count(*) FROM log_alarms WHERE origin = ? AND kind = ?) < ?
    AND (SELECT count(*) FROM log_alarms WHERE node_id = ? AND kind = ?) < ?"""


async def load(database: Database) -> list[Witnessed]:
    rows = await database.scan(f"SELECT {_WITNESSED} FROM witnessed")
    return [Witnessed(*row) for row in rows]


async def keep(database: Database, new: Witnessed, last: Witnessed | None) -> bool:
    """Write `new`, if `last` is still what was cosigned last; returns whether it is."""
    before = (last.size, last.root) if last else (-1, b"")
    (count,) = await database.write((_KEEP, (*msgspec.structs.astuple(new), *before)))
    return count == 1


async def add_alarm(database: Database, alarm: Alarm) -> bool:
    """Returns whether it is new, and not one of too many about one log or box."""
    fields = msgspec.structs.astuple(alarm)
    of_log = (alarm.origin, alarm.kind, MAX_ALARMS_PER_LOG)
    of_box = (alarm.node_id, alarm.kind, MAX_ALARMS_PER_BOX)
    (count,) = await database.write((_ADD, (*fields, *of_log, *of_box)))
    return count == 1


async def alarms(database: Database) -> list[Alarm]:
    """The oldest first."""
    rows = await database.scan(f"SELECT {_ALARM} FROM log_alarms ORDER BY found_at, id")
    return [_alarm(row) for row in rows]


async def dismiss(database: Database, origin: str, *entries: SqlStatement) -> None:
    """All that is known of a log no longer counts; `entries` are for the audit trail."""
    change = "UPDATE log_alarms SET dismissed = 1 WHERE origin = ?"
    await database.write((change, (origin,)), *entries)


def _alarm(row: Row) -> Alarm:
    fields = dict(zip(Alarm.__struct_fields__, row, strict=True))
    return Alarm(**{**fields, "dismissed": bool(fields["dismissed"])})

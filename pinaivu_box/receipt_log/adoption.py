"""Gives entries to receipts that have none: those from before there was a log, and those whose log
has ended before a checkpoint covered them."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from pathlib import Path

from pinaivu_box import identity as identities
from pinaivu_box.receipts.receipt import RECEIPT_DOMAIN
from pinaivu_box.store import log as store

_BATCH = 500
_BUSY_SECONDS = 15.0
NEXT = (
    "SELECT rowid, created_at, signed, signature FROM receipts WHERE log_entry IS NULL"
    " AND (created_at, rowid) > (?, ?) ORDER BY created_at, rowid LIMIT ?"
)

log = logging.getLogger("pinaivu.log")


def adopt(path: Path, node_id: str) -> int:
    """Append an entry for each receipt without one that this box has signed, in the order of their
    time; returns how many.  If it is interrupted, another call goes on.  Raises sqlite3.Error."""
    count = 0
    with contextlib.closing(
        sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    ) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        last = (-(2**63), 0)
        while batch := _batch(connection, node_id, last):
            last, adopted = batch
            count += adopted
            if adopted and count % (100 * _BATCH) == 0:
                log.info("%d receipts have got entries in the log", count)
        connection.execute(*store.done(store.ADOPT))
    return count


def _batch(
    connection: sqlite3.Connection, node_id: str, last: tuple[int, int]
) -> tuple[tuple[int, int], int] | None:
    """The place of its last receipt, and how many have got an entry; None after the last one."""
    count = 0
    connection.execute("BEGIN IMMEDIATE")
    try:
        rows = connection.execute(NEXT, (*last, _BATCH)).fetchall()
        for rowid, _, signed, signature in rows:
            if not identities.verify(node_id, RECEIPT_DOMAIN, signed, signature):
                continue  # whoever examines the log says so
            count += 1
            entry = connection.execute(*store.append(signed)).lastrowid
            connection.execute("UPDATE receipts SET log_entry = ? WHERE rowid = ?", (entry, rowid))
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    return ((rows[-1][1], rows[-1][0]), count) if rows else None

"""Gives entries to receipts that have none: those from before there was a log, and those whose log
has ended before a checkpoint covered them.

The first of them get theirs before the box serves anything, which is all after most restarts of a
log; others while it serves, between new receipts.  A log says nothing of order in time, so neither
its proofs nor its checkpoints mind: each receipt gets one entry, in the transaction that says
which, and until then the task is pending, so that nobody takes a receipt without one for inserted.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from pathlib import Path

from pinaivu_box import identity as identities
from pinaivu_box.receipts.receipt import RECEIPT_DOMAIN
from pinaivu_box.store import log as store

BEFORE_SERVING = 5000  # receipts: less than a second
BATCH = 100  # of a transaction, for which new receipts have to wait
_BUSY_SECONDS = 15.0
_TOLD = 50_000  # receipts between two lines of the log
_FIRST = (-(2**63), 0)
NEXT = (
    "SELECT rowid, created_at, signed, signature FROM receipts WHERE log_entry IS NULL"
    " AND (created_at, rowid) > (?, ?) ORDER BY created_at, rowid LIMIT ?"
)

log = logging.getLogger("pinaivu.log")


class Adoption:
    """Appends an entry for each receipt without one that this box has signed, in the order of their
    time.  `count` are those that it has appended, `done` says that there are no more.  If it is
    interrupted, another one goes on; nothing else may end or begin a log while it runs."""

    def __init__(self, path: Path, node_id: str) -> None:
        self._path, self._node_id = path, node_id
        self._last = _FIRST
        self.count, self.done = 0, False

    def run(self, most: int) -> bool:
        """About so many more; returns whether there may be others.  Raises sqlite3.Error."""
        goal = self.count + most
        with contextlib.closing(
            sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
        ) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            while not self.done and self.count < goal:
                before = self.count
                self.done = not self._batch(connection)
                if self.count // _TOLD > before // _TOLD:
                    log.info("%d receipts have got entries in the log", self.count)
        return not self.done

    def _batch(self, connection: sqlite3.Connection) -> bool:
        """Whether there were any; without, the task is no longer pending."""
        connection.execute("BEGIN IMMEDIATE")
        try:
            rows = connection.execute(NEXT, (*self._last, BATCH)).fetchall()
            count = sum([self._append(connection, *row) for row in rows])
            if not rows:
                connection.execute(*store.done(store.ADOPT))
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        if rows:
            self._last, self.count = (rows[-1][1], rows[-1][0]), self.count + count
        return bool(rows)

    def _append(
        self, connection: sqlite3.Connection, rowid: int, _: int, signed: bytes, signature: bytes
    ) -> bool:
        if not identities.verify(self._node_id, RECEIPT_DOMAIN, signed, signature):
            return False  # whoever examines the log says so
        entry = connection.execute(*store.append(signed)).lastrowid
        connection.execute("UPDATE receipts SET log_entry = ? WHERE rowid = ?", (entry, rowid))
        return True

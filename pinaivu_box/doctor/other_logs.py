"""The check of what this box knows of the logs of other boxes (`witness.alarms`)."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from pinaivu_box.doctor.check import Check, State
from pinaivu_box.store import integrity, witnessed

NAME = "others' logs"
_FIRST_VERSION = 7  # of the schema, which has the table


def examine(home: Path) -> Iterator[Check]:
    """One finding for each alarm that counts; none where there is nothing to say."""
    path = home / "pinaivu.db"
    if not path.exists():
        return
    try:
        with integrity.reading(path) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version < _FIRST_VERSION:
                return
            found = connection.execute(witnessed.COUNTING).fetchall()
    except sqlite3.Error:
        return  # the check of the database says what is wrong
    for alarm_id, kind, detail in found:
        state: State = "failed" if kind in witnessed.LOUD else "warning"
        todo = (
            f"'pinaivu receipts evidence {alarm_id[:12]}' shows it (--dismiss: it no longer counts)"
        )
        yield Check(NAME, state, detail.rstrip("."), todo)

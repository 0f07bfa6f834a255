"""Checks that what the box has signed is still there: receipts, entries of the log, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from pinaivu_box.doctor.check import Check
from pinaivu_box.log.restart import Restart
from pinaivu_box.receipt_log import examine, histories, last_shown
from pinaivu_box.receipt_log.examine import Examination
from pinaivu_box.store import integrity
from pinaivu_box.store.log import Log

_NAME = "log"
_FIRST_VERSION = 7  # of the schema, that has it
_CHANGED = "somebody else than the box has written to the database: find out who, and keep a copy"


def whole(home: Path) -> Iterator[Check]:
    if (examination := examined(home)) is None:
        yield Check(_NAME, "ok", "none yet: the next start begins it")
        return
    for finding in examination.findings:
        yield Check(_NAME, "failed", finding.message, _CHANGED)
    if (reason := restarted(examination)) is not None:
        found = f"the log of receipts had to begin again: {reason.removesuffix('.')}"
        yield Check(_NAME, "warning", found, "GET /v1/log shows what was signed about it")
    if not examination.findings:
        counts = f"{examination.entries:,} entries, {examination.receipts:,} receipts"
        yield Check(_NAME, "ok", f"{counts}, all as they were signed")


def examined(home: Path, check: examine.Check = examine.check_signature) -> Examination | None:
    """Everything; None if there is no log yet.  Raises sqlite3.Error."""
    path = home / "pinaivu.db"
    if not path.exists():
        return None
    shown = last_shown.read(home, None)  # before the database, which goes on
    with integrity.reading(path) as connection:
        if connection.execute("PRAGMA user_version").fetchone()[0] < _FIRST_VERSION:
            return None
        said = shown[0] if shown is not None else None
        examination = examine.everything(connection, check, said)
    return examination if examination.logs else None


def restarted(examination: Examination) -> str | None:
    """Why the log has begun again, if that should not have been."""
    reasons = [reason for log in examination.logs if (reason := _reason(log)) is not None]
    odd = [each for each in reasons if each not in (histories.RESTORED, histories.LOST)]
    return odd[-1] if odd else None


def _reason(log: Log) -> str | None:
    """None if it followed none; of a statement that cannot be read the findings say so."""
    if log.restart is None:
        return None
    try:
        return msgspec.json.decode(log.restart, type=Restart).reason
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
